"""Numbers of a tensor's bytes: widened exactly, and rounded once from float64.

numpy has no bfloat16: a number of it is the upper half of a float32.

Shape suffix: C = consecutive elements of a tensor.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]

_STORED: Final[Mapping[str, str]] = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
_EXPONENT: Final[Mapping[str, int]] = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
_NARROW: Final[Mapping[str, int]] = {"F16": 13, "BF16": 16}  # fewer bits of the fraction than float32 has
_SIGN_AND_FRACTION: Final = np.int32(0x0FFFE000 - (1 << 31))
_NAN: Final = 0x7FC0  # of bfloat16


def stored(data: memoryview | bytearray, dtype: str) -> NDArray[Any]:
    """Return the elements [C] of ``data`` without a copy; those of bfloat16 as their 16 bits."""
    return np.frombuffer(data, dtype=f"<{_STORED[dtype]}")


def widened(data: memoryview | bytearray, dtype: str, room: NDArray[np.float32] | None = None) -> Floats:
    """Return the floating-point numbers [C] of ``data``, without a copy where that is fast.

    ``room`` of at least C elements takes those of 16 bits as float32. numpy's own conversion of float16 is slow: with
    sign and fraction in the places of float32, a product with 2¹¹² sets the exponent, of subnormal numbers too.
    """
    bits_C = stored(data, dtype)
    if dtype not in _NARROW or (dtype == "F16" and not is_finite(data, dtype, room)):
        return bits_C
    single_C = np.empty(len(bits_C), np.float32) if room is None else room[: len(bits_C)]
    wide_C = single_C.view(np.int32)
    np.copyto(wide_C, bits_C.view(np.int16))  # extends the sign
    np.left_shift(wide_C, _NARROW[dtype], out=wide_C)
    if dtype == "F16":
        np.bitwise_and(wide_C, _SIGN_AND_FRACTION, out=wide_C)
        single_C *= np.float32(2.0**112)
    return single_C


def numbers(data: memoryview | bytearray, dtype: str) -> NDArray[np.float64]:
    """Return the floating-point numbers [C] of ``data`` in float64."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return widened(data, dtype).astype(np.float64)


def is_finite(data: memoryview | bytearray, dtype: str, room: NDArray[Any] | None = None) -> bool:
    """Return whether no floating-point number of ``data`` is NaN or infinite.

    ``room`` has at least as many bytes as ``data``.
    """
    bits_C = np.frombuffer(data, dtype=f"<u{np.dtype(_STORED[dtype]).itemsize}")
    if not len(bits_C):
        return True
    mask, out = bits_C.dtype.type(_EXPONENT[dtype]), None if room is None else room.view(bits_C.dtype)[: len(bits_C)]
    return bool(np.bitwise_and(bits_C, mask, out=out).max() != mask)


def round_into(
    data: memoryview | bytearray, dtype: str, sum_C: NDArray[np.float64], room: NDArray[np.uint32] | None = None
) -> None:  # fmt: skip
    """Round float64 numbers once, to the nearest of ``dtype`` and ties to even, into ``data``.

    For bfloat16 they are first rounded to float32. A second rounding goes wrong only where the first one ends halfway
    between two of its numbers and was not exact; there the float32 is moved by one bit towards the exact number.

    Args:
        data: C elements of ``dtype``.
        dtype: a floating-point dtype.
        sum_C: the numbers.
        room: at least 2 C elements to work in; None allocates them.
    """
    out_C = stored(data, dtype)
    if dtype != "BF16":
        np.copyto(out_C, sum_C, casting="same_kind")
        return
    room = np.empty(2 * len(sum_C), np.uint32) if room is None else room
    bits_C, rounding_C = room[: len(sum_C)], room[len(sum_C) : 2 * len(sum_C)]
    single_C = bits_C.view(np.float32)
    np.copyto(single_C, sum_C, casting="same_kind")
    wrong_C = np.equal(np.left_shift(bits_C, 16, out=rounding_C), 1 << 31)
    wrong_C &= np.not_equal(single_C, sum_C)
    if len(at := np.flatnonzero(wrong_C)):
        exact, single = np.abs(sum_C[at]), np.abs(single_C[at].astype(np.float64))
        bits_C[at] += (exact > single).astype(np.uint32) - (exact < single).astype(np.uint32)
    np.right_shift(bits_C, 16, out=rounding_C)
    np.bitwise_and(rounding_C, 1, out=rounding_C)
    np.add(rounding_C, 0x7FFF, out=rounding_C)
    nan_C = np.isnan(single_C) if np.isnan(single_C.max(initial=0.0)) else None  # the addition may overflow theirs
    np.add(rounding_C, bits_C, out=rounding_C)
    np.copyto(out_C, np.right_shift(rounding_C, 16, out=rounding_C), casting="unsafe")
    if nan_C is not None:
        out_C[nan_C] = _NAN
