"""Numbers of a tensor's bytes, against torch: widened exactly, and rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ckptavg.checkpoints.numbers import is_finite, numbers, round_into
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.readers import FLOATING, ITEM_SIZE

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NaN in the data themselves
COUNT = 1 << 15
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
CUT = (1 << 39) - 1  # significand bits of a float64 after the first 14


def rounded(sum_C: NDArray[np.float64], dtype: str) -> bytearray:
    data = bytearray(len(sum_C) * ITEM_SIZE[dtype])
    with np.errstate(all="ignore"):
        round_into(data, dtype, sum_C, np.empty(2 * len(sum_C), np.uint32))
    return data


def reference(sum_C: NDArray[np.float64], dtype: str) -> torch.Tensor:
    """Round to odd at 14 bits, so that torch's conversion by way of float32 rounds once (Boldo and Melquiond 2008)."""
    bits = torch.from_numpy(sum_C).view(torch.int64)
    if dtype in ("F16", "BF16"):
        bits = (((bits & CUT) + CUT) | bits) & ~CUT
    return bits.view(torch.float64).to(TORCH[dtype])


def sums() -> Iterator[NDArray[np.float64]]:
    """Yield ordinary numbers, all bit patterns, numbers of every size, and those near the middle of two 16-bit ones."""
    draws = np.random.default_rng(0)
    yield draws.standard_normal(COUNT)
    yield draws.integers(0, 2**64, COUNT, dtype=np.uint64).view(np.float64)
    yield draws.standard_normal(COUNT) * 2.0 ** draws.integers(-160, 140, COUNT)
    upper = draws.integers(0, 2**16, COUNT).astype(np.uint32) << 16
    for lower in (0x7FFF, 0x8000, 0x8001):
        halfway = (upper | lower).view(np.float32).astype(np.float64).view(np.int64)
        for near in (2, 2**29, 2**31):
            yield (halfway + draws.integers(-near, near + 1, COUNT)).view(np.float64)
    half = draws.integers(0, 2**16, COUNT).astype(np.uint16).view(np.float16).astype(np.float64).view(np.int64)
    for near in (2, 2**31):
        yield (half + (1 << 41) + draws.integers(-near, near + 1, COUNT)).view(np.float64)


@pytest.mark.parametrize("dtype", FLOATING)
def test_a_sum_is_rounded_once_to_nearest_even(dtype: str):
    for sum_C in sums():
        data, expected = rounded(sum_C, dtype), reference(sum_C, dtype)
        found = torch.frombuffer(data, dtype=TORCH[dtype])
        assert torch.equal(found.isnan(), expected.isnan())
        integers = INTEGERS[found.itemsize]
        different = (found.view(integers) != expected.view(integers)) & ~expected.isnan()
        assert not different.any(), sum_C[different.numpy()][:3]


@pytest.mark.parametrize("dtype", FLOATING)
def test_every_number_is_widened_exactly(dtype: str):
    data = np.random.default_rng(1).integers(0, 256, COUNT * ITEM_SIZE[dtype], dtype=np.uint8)
    if ITEM_SIZE[dtype] == 2:
        data = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    buffer = bytearray(data.tobytes())
    with np.errstate(all="ignore"):
        wide = numbers(buffer, dtype)
    np.testing.assert_array_equal(wide, torch.frombuffer(buffer, dtype=TORCH[dtype]).double().numpy())


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found(dtype: str, value: float):
    values = torch.full((100,), torch.finfo(TORCH[dtype]).max, dtype=TORCH[dtype])
    values[50:] = torch.finfo(TORCH[dtype]).min
    assert is_finite(bytearray(values.view(torch.uint8).numpy().tobytes()), dtype)
    for place in (0, 50, 99):
        other = values.clone()
        other[place] = value
        assert not is_finite(bytearray(other.view(torch.uint8).numpy().tobytes()), dtype)
    assert is_finite(bytearray(), dtype)


def test_a_nan_whose_payload_would_overflow_stays_one():
    payload = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32).astype(np.float64)
    assert torch.frombuffer(rounded(payload, "BF16"), dtype=torch.bfloat16).isnan().all()
    assert rounded(np.empty(0), "BF16") == bytearray()
