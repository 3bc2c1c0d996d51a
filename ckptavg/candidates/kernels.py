"""Both products with the candidate matrix on a CUDA device, each in one pass over its rows as they are stored.

torch would first write 16-bit rows and codes as float32, which takes ten times as long as reading them. A block of
columns stays in registers while the N rows pass by. No sum depends on the order in which blocks run.

Shape suffixes: N = candidates, D = elements of one dtype, B = columns of a block, P = words per row, K = elements per
group, H = groups of a row, G = groups of a block.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # the stride between dense rows is a multiple: a block of any kernel is loaded without a mask
_MIXED, _AT_ONCE, _DOTTED = 1024, 4, 4096  # columns of a block; rows loaded at once
_CODES = 2048  # of a block


def check() -> None:
    """Compile and run one kernel on the current device.

    Raises:
        Exception: of any kind, where Triton does not work.
    """
    rows_ND = torch.ones(1, COLUMNS, device="cuda")
    Dense(rows_ND).mix(rows_ND[0, :1], rows_ND[0], 0, 1)


class Dense:
    """See `ckptavg.candidates.products.Products`; with the rows [N, D] of `ckptavg.candidates.dense.Dense`."""

    def __init__(self, rows_ND: Tensor) -> None:
        self._rows_ND = rows_ND
        self._dtype = torch.promote_types(rows_ND.dtype, torch.float32)

    def mix(self, c_N: Tensor, out_D: Tensor, start: int, stop: int) -> None:  # noqa: D102
        n, first = len(self._rows_ND), start // _MIXED
        with torch.cuda.device_of(out_D):
            _mix[(triton.cdiv(stop, _MIXED) - first,)](
                self._rows_ND, c_N.to(self._dtype), out_D, self._rows_ND.stride(0), first, start, stop, n,
                ROWS=_AT_ONCE, B=_MIXED,
            )  # fmt: skip

    def dot(self, g_D: Tensor, start: int, stop: int) -> Tensor:  # noqa: D102
        n, first = len(self._rows_ND), start // _DOTTED
        sums_BN = torch.empty(triton.cdiv(stop, _DOTTED) - first, n, dtype=self._dtype, device=g_D.device)
        with torch.cuda.device_of(g_D):
            _dot[(len(sums_BN),)](
                self._rows_ND,
                g_D,
                sums_BN,
                self._rows_ND.stride(0),
                first,
                start,
                stop,
                n,
                B=_DOTTED,
                num_warps=8,
            )
        return sums_BN.sum(dim=0)


class Packed:
    """See `ckptavg.candidates.products.Products`; with the parts of `ckptavg.candidates.packed.Packed`."""

    def __init__(
        self, words_NP: Tensor, scale_NH: Tensor, zero_NH: Tensor, mean_D: Tensor, *, bits: int, group: int
    ) -> None:
        self._parts = words_NP, scale_NH, zero_NH, mean_D
        self._group = group
        wide = triton.next_power_of_2(group)
        self._sizes = {"BITS": bits, "K": group, "WIDE": wide, "G": max(1, _CODES // wide)}

    def mix(self, c_N: Tensor, out_D: Tensor, start: int, stop: int) -> None:  # noqa: D102
        blocks, place = self._blocks(start, stop)
        with torch.cuda.device_of(out_D):
            _mix_packed[(blocks,)](*self._parts, c_N.float(), out_D, *place, **self._sizes)

    def dot(self, g_D: Tensor, start: int, stop: int) -> Tensor:  # noqa: D102
        blocks, place = self._blocks(start, stop)
        sums_BN = torch.empty(blocks, len(self._parts[0]), device=g_D.device)
        with torch.cuda.device_of(g_D):
            _dot_packed[(blocks,)](*self._parts, g_D, sums_BN, *place, **self._sizes)
        return sums_BN.sum(dim=0)

    def _blocks(self, start: int, stop: int) -> tuple[int, tuple[int, ...]]:
        """Return how many blocks hold the columns, and the numbers from which a kernel finds them."""
        n, columns = self._parts[0].shape  # of a field
        first, last = start // columns, (stop - 1) // columns
        begin, end = (start - first * columns, stop - first * columns) if first == last else (0, columns)
        begin, end, used = begin // self._group, triton.cdiv(end, self._group), last - first + 1
        return used * triton.cdiv(end - begin, self._sizes["G"]), (columns, first, used, begin, start, stop, n)


@triton.jit(do_not_specialize=["first", "start", "stop", "n"])
def _mix(rows, c, out, stride, first, start, stop, n, ROWS: tl.constexpr, B: tl.constexpr):
    dtype: tl.constexpr = c.dtype.element_ty
    at = (first + tl.program_id(0)).to(tl.int64) * B + tl.arange(0, B)
    total = tl.zeros([B], dtype)
    for begin in range(0, n, ROWS):
        for j in tl.static_range(ROWS):
            i = begin + j
            values = tl.load(rows + tl.cast(stride, tl.int64) * i + at, mask=i < n, other=0)
            total += tl.load(c + i, mask=i < n, other=0) * values.to(dtype)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(at >= start) & (at < stop))


@triton.jit(do_not_specialize=["first", "start", "stop", "n"])
def _dot(rows, g, sums, stride, first, start, stop, n, B: tl.constexpr):
    dtype: tl.constexpr = sums.dtype.element_ty
    at = (first + tl.program_id(0)).to(tl.int64) * B + tl.arange(0, B)
    inside = (at >= start) & (at < stop)
    by = tl.load(g + at, mask=inside, other=0).to(dtype)
    for i in range(n):
        values = tl.load(rows + tl.cast(stride, tl.int64) * i + at)
        product = tl.where(inside, values.to(dtype) * by, 0)  # columns that are padding may hold NaN
        tl.store(sums + tl.program_id(0).to(tl.int64) * n + i, tl.sum(product))


@triton.jit
def _place(columns, field, used, begin, start, stop, K: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr):
    """Return a block's field, groups [G], words [G, K] and columns [G, K], and masks of the last three."""
    f = field + tl.program_id(0) % used
    h = begin + tl.program_id(0) // used * G + tl.arange(0, G)
    known_h = h < columns // K
    k = tl.arange(0, WIDE)
    p = h.to(tl.int64)[:, None] * K + k[None, :]
    known = known_h[:, None] & (k < K)[None, :]
    at = f.to(tl.int64) * columns + p
    return f, h + f.to(tl.int64) * (columns // K), p, at, known_h, known, known & (at >= start) & (at < stop)


@triton.jit
def _decode(words, scale, zero, i, columns, groups, f, h, p, known_h, known, BITS: tl.constexpr):
    """Return a row's codes [G, K] as float32, and the scale and zero [G] of its groups."""
    code = tl.load(words + tl.cast(columns, tl.int64) * i + p, mask=known, other=0)
    if BITS < 8:
        code = (code.to(tl.int32) >> (f * BITS)) & (2**BITS - 1)
    at = tl.cast(groups, tl.int64) * i + h
    return code.to(tl.float32), tl.load(scale + at, mask=known_h, other=0), tl.load(zero + at, mask=known_h, other=0)


# the ends are specialized: where they are multiples of 16, columns are read and written 16 bytes at a time
@triton.jit(do_not_specialize=["field", "used", "begin", "n"])
def _mix_packed(
    words, scale, zero, mean, c, out, columns, field, used, begin, start, stop, n,
    BITS: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    f, h, p, at, known_h, known, inside = _place(columns, field, used, begin, start, stop, K, WIDE, G)
    fields: tl.constexpr = 8 // BITS if BITS < 8 else 1
    groups = columns // K * fields
    total = tl.zeros([G, WIDE], tl.float32)
    level = tl.zeros([G], tl.float32)
    for i in range(n):
        code, s, z = _decode(words, scale, zero, i, columns, groups, f, h, p, known_h, known, BITS)
        c_i = tl.load(c + i).to(tl.float32)
        total += (c_i * s)[:, None] * code
        level += c_i * z
    total += level[:, None] + tl.load(mean + at, mask=inside, other=0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["field", "used", "begin", "n"])
def _dot_packed(
    words, scale, zero, mean, g, sums, columns, field, used, begin, start, stop, n,
    BITS: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    f, h, p, at, known_h, known, inside = _place(columns, field, used, begin, start, stop, K, WIDE, G)
    fields: tl.constexpr = 8 // BITS if BITS < 8 else 1
    groups = columns // K * fields
    by = tl.load(g + at, mask=inside, other=0).to(tl.float32)
    shared = tl.sum(by * tl.load(mean + at, mask=inside, other=0))
    level = tl.sum(by, axis=1)
    block = tl.program_id(0).to(tl.int64) * n
    for i in range(n):
        code, s, z = _decode(words, scale, zero, i, columns, groups, f, h, p, known_h, known, BITS)
        by_group = s * tl.sum(code * by, axis=1) + z * level
        tl.store(sums + block + i, tl.sum(by_group) + shared)
