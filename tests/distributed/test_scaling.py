"""Measurements of the benchmark at small sizes: bytes on the wire, and the memory of a shard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "benchmark"))
from scaling import Size, measured

FEW, WIDE, MANY, LARGE = Size(4, 16, 2), Size(4, 512, 2), Size(64, 16, 2), Size(6, 768, 16)
PARTS = [("shard", LARGE), ("whole", LARGE), ("traffic", FEW), ("traffic", WIDE), ("traffic", MANY)]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Size], list[float]]:
    """Return the measurements of each of two workers."""
    folder = tmp_path_factory.mktemp("candidates")
    results = measured(2, *((part, size.place(folder)) for part, size in PARTS))
    return {key: [one["bytes"] for one in each] for key, each in zip(PARTS, results, strict=True)}


def test_a_step_sends_numbers_for_candidates_and_none_for_parameters(figures: dict[tuple[str, Size], list[float]]):
    """Compare the bytes that the kernel counted over all connections of the process."""
    few, wide, many = (figures["traffic", size][0] for size in (FEW, WIDE, MANY))
    assert abs(wide - few) < 100  # 1,024 times as many parameters; the rest is gloo's own messages
    assert 8 * 60 <= many - few < 2 * 8 * 60


def test_a_shard_takes_half_the_memory(figures: dict[tuple[str, Size], list[float]]):
    whole, part = max(figures["whole", LARGE]), max(figures["shard", LARGE])
    assert part <= 0.6 * whole
    assert part > LARGE.n / 2 * 4 * LARGE.parameters  # at least half of the candidates
