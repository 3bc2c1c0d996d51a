"""Random numbers of draws: golden values, their distribution, and independence of keys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import kstest, norm

from ckptavg.average.noise import standard_normal, stream_key

COUNT = 100_000
GOLDEN_KEYS = (
    0x5CC3A6551605A0B4E9C3334F5EB5554C,
    0x6C336140157A59E78C97EBC6EF8CEE3B,
)
GOLDEN = {
    0: ["-0x1.22cd198aad6f1p+1", "-0x1.67147405be6f1p-1", "-0x1.380f15f728ce0p+0", "0x1.4c209a0cbd7dap-3"],
    12345: ["0x1.80945af1b29d7p-2", "0x1.8185f7d6434f8p-1", "0x1.96967835201dcp-1", "-0x1.fe0307ae03eeep-1"],
    GOLDEN_KEYS[1]: ["-0x1.6da1052cd7d8ap-2", "0x1.137b2a6c273ddp-2", "0x1.751bf73546f7cp-4", "-0x1.a80b6288c14eep-1"],
}  # fmt: skip


def test_numbers_of_a_key_never_change():
    """Golden values: with others, files that exist could not be made again."""
    assert stream_key(0, 1) == GOLDEN_KEYS[0] and stream_key(7, 3, "layer.weight") == GOLDEN_KEYS[1]
    # the quantile of a number in the centre is a ratio of polynomials; in the tails it has a logarithm of the system
    for key, numbers in GOLDEN.items():
        assert standard_normal(key, 0, len(numbers)).tolist() == pytest.approx(
            [*map(float.fromhex, numbers)], rel=2**-51
        )


def test_the_bits_of_numbers_in_the_centre_never_change():
    for key, numbers in GOLDEN.items():
        found = [number.hex() for number in standard_normal(key, 0, len(numbers)).tolist()]
        assert [a for a, b in zip(found, numbers, strict=True) if abs(float.fromhex(b)) < 1] == [
            b for b in numbers if abs(float.fromhex(b)) < 1
        ]


def test_numbers_are_a_function_of_key_and_index():
    whole = standard_normal(5, 0, 1000)
    for start, count in itertools.product((0, 1, 2, 3, 4, 5, 997), (0, 1, 3, 4, 7)):
        part = standard_normal(5, start, min(count, 1000 - start))
        assert part.tolist() == whole[start : start + len(part)].tolist()
    far = standard_normal(5, 2**40 + 1, 3)
    assert far.tolist() == standard_normal(5, 2**40 - 2, 6)[3:].tolist()


def test_numbers_are_standard_normal():
    numbers = standard_normal(stream_key(0, 1, "w"), 0, COUNT)
    assert kstest(numbers, norm.cdf).pvalue > 0.01
    assert abs(numbers.mean()) < 4 / np.sqrt(COUNT) and abs(numbers.var() - 1) < 4 * np.sqrt(2 / COUNT)
    # successive numbers are not correlated, nor are their sizes
    for values in (numbers, np.abs(numbers)):
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(COUNT)
    assert np.isfinite(numbers).all() and np.abs(numbers).max() < 6


def test_other_seeds_samples_and_names_give_independent_numbers():
    keys = [stream_key(*key) for key in ((0, 1), (0, 2), (1, 1), (0, 1, "a"), (0, 1, "b"), (0, 11), (0, 1, ""))]
    assert len({*keys}) == len(keys)
    correlations = np.corrcoef([standard_normal(key, 0, COUNT) for key in keys]) - np.eye(len(keys))
    assert np.abs(correlations).max() < 4.5 / np.sqrt(COUNT)
    # the first numbers of successive samples too
    firsts = np.array([standard_normal(stream_key(0, sample, "w"), 0, 1)[0] for sample in range(1, 3001)])
    assert kstest(firsts, norm.cdf).pvalue > 0.01
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 4 / np.sqrt(3000)
