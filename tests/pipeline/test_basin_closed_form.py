"""Basins of losses in closed form: barriers of known height, and candidates that are set aside."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from inspected import barriers, basins, numbers
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Ring(nn.Module):
    """The loss is lowest on the unit circle, and worst at its centre."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))


def ring_loss(model: nn.Module, batch: Tensor) -> Tensor:
    (w,) = model.parameters()
    return 1 + batch * (w.square().sum() - 1).square()


def test_a_barrier_within_the_noise_of_the_examples_does_not_separate(tmp_path: Path):
    """The midpoint lies a quarter of `weights` above its ends: 0.05 on average, which is 2.5 tolerances."""
    for step, w in enumerate(([1.0, 0.0], [0.0, 1.0]), 1):
        torch.save({"w": torch.tensor(w)}, tmp_path / f"step-{step}.pt")
    for spread, expected in ((2.0, []), (0.2, [(1, 2)])):  # its standard error is spread / 4 / √32: 0.09, or 0.009
        weights = 0.2 + spread * torch.tensor([1.0, -1.0] * 16)
        found = basins(tmp_path, model=Ring, loss=ring_loss, val=[weights])
        barrier = found.midpoints[0].barrier
        assert barrier is not None and barrier.value == pytest.approx(0.05, abs=1e-6) and barrier.low is not None
        assert barriers(found) == expected


def test_a_barrier_that_no_two_neighbours_show_is_found_from_the_last_and_named_where_it_was_measured(tmp_path: Path):
    """A bent path of small steps: neighbours average, but the two ends do not."""
    for i in range(9):
        angle = math.pi * i / 16
        torch.save({"w": torch.tensor([math.cos(angle), math.sin(angle)])}, tmp_path / f"step-{i + 1}.pt")

    data = [torch.linspace(0.9, 1.1, 32)]
    found = basins(tmp_path, model=Ring, loss=ring_loss, val=data)
    assert all(not midpoint.separates for midpoint in found.midpoints if midpoint.steps[1] - midpoint.steps[0] == 1)
    # (1 − cos² of half the angle)² = sin⁴ exceeds 2 % from an angle of 44° on: beyond three steps of 11°
    assert numbers(found) == [1, 2, 2, 2, 2, 3, 3, 3, 3]
    named = [(int(a), int(b)) for a, b in re.findall(r"between steps (\d+) and (\d+)", found.verdict)]
    assert len(named) == 2 and set(named) <= set(barriers(found))


def test_an_exploded_candidate_is_set_aside_and_hides_no_neighbour(tmp_path: Path):
    """Its own loss dwarfs every barrier, on whichever side."""
    for scale, hidden in ((30.0, [1, 1, None, 1, 1]), (1e8, [1, 1, None, 1, 1]), (1.5, [1, 1, 1, 1, 1])):
        for step, w in enumerate((0.9, 1.0, scale, 1.1, 1.05), 1):
            torch.save({"w": torch.tensor([w, 0.0])}, tmp_path / f"step-{step}.pt")
        found = basins(tmp_path, model=Ring, loss=ring_loss, val=[torch.linspace(0.9, 1.1, 32)])
        assert numbers(found) == hidden and barriers(found) == []
        said = "1 candidate has exploded (over 100 times worse than the median): leave out with --exclude 'step-3.pt'."
        assert (said in found.verdict) == (None in hidden)


def test_a_midpoint_without_a_finite_loss_separates(tmp_path: Path):
    """Both ends are finite, and log 0 is met between them."""
    for step, value in enumerate((-1.0, 1.0, 1.5), 1):
        torch.save({"weight": torch.tensor([[value]])}, tmp_path / f"step-{step}.pt")
    found = basins(
        tmp_path, model=lambda: nn.Linear(1, 1, bias=False), val=[torch.ones(20, 1)],
        loss=lambda model, batch: model(batch).abs().log().neg().flatten(),
    )  # fmt: skip
    assert barriers(found) == [(1, 2)] and numbers(found) == [1, 2, 2]
    assert found.midpoints[0].barrier is None and found.midpoints[0].score.invalid


def test_a_candidate_without_a_finite_loss_is_in_no_basin(tmp_path: Path):
    for step, value in enumerate((1.0, 0.0, 1.5), 1):
        torch.save({"weight": torch.tensor([[value]])}, tmp_path / f"step-{step}.pt")
    found = basins(
        tmp_path, model=lambda: nn.Linear(1, 1, bias=False), val=[torch.ones(20, 1)],
        loss=lambda model, batch: model(batch).abs().log().neg().flatten(),
    )  # fmt: skip
    assert numbers(found) == [1, None, 1]
    assert "1 candidate has no finite score: leave out with --exclude 'step-2.pt'." in found.verdict


def test_two_candidates_to_leave_out_are_named_without_an_option_that_takes_one(tmp_path: Path):
    """A second --exclude replaces the first."""
    for step, w in enumerate((1.0, 1e8, 1.1, 1e20, 0.9), 1):
        torch.save({"w": torch.tensor([w, 0.0])}, tmp_path / f"step-{step}.pt")
    given: dict[str, Any] = {"model": Ring, "loss": ring_loss, "val": [torch.linspace(0.9, 1.1, 32)]}
    both = basins(tmp_path, **given)
    assert "step-4.pt. 1 candidate has exploded" in both.verdict and "step-2.pt. Give only the files" in both.verdict
    assert "--exclude" not in both.verdict
    one = basins(tmp_path, **given, exclude="step-4.pt")
    assert "step-2.pt. Give only the files" in one.verdict and "--exclude" not in one.verdict
