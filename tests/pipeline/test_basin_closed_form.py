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

import ckptavg


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
    named = [tuple(map(int, steps)) for steps in re.findall(r"between steps (\d+) and (\d+) ", found.verdict)]
    assert named == [(1, 2), (5, 6)]  # where the table has another basin
    shown = re.findall(r"\(by the midpoint of (\d+) and (\d+)\)", found.verdict)
    assert len(shown) == 2 and {(int(a), int(b)) for a, b in shown} <= set(barriers(found))


def test_runs_of_given_files_are_named_by_their_directories_and_kept_by_their_files(tmp_path: Path):
    files: list[Path] = []
    for name, angle in (("a", 0.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        for step in (1, 2):
            w = (1 + 0.01 * step) * torch.tensor([math.cos(angle), math.sin(angle)])
            files.append(tmp_path / name / f"step-{step}.pt")
            torch.save({"w": w}, files[-1])
    found = basins(*files, model=Ring, loss=ring_loss, val=[torch.linspace(0.9, 1.1, 32)])
    assert numbers(found) == [1, 2, 1, 2]
    assert f"between the last candidates of {tmp_path / 'a'} and {tmp_path / 'b'}." in found.verdict
    kept = " ".join(map(str, files[:2]))
    assert f"{kept} alone keeps one basin: 2 candidates" in found.verdict


def test_a_candidate_whose_average_is_worse_than_the_better_one_alone_is_named_though_no_barrier_is_between(
    tmp_path: Path,
):
    """(w² − 1)² is convex beyond w = 1/√3: the midpoint of 1 and 0.62 has the loss 1 + (0.81² − 1)² = 1.1183."""
    data = [torch.linspace(0.9, 1.1, 32)]
    for other, harm in ((0.62, True), (0.95, False)):
        for step, w in enumerate((1.0, other), 1):
            torch.save({"w": torch.tensor([w, 0.0])}, tmp_path / f"step-{step}.pt")
        found = basins(tmp_path, model=Ring, loss=ring_loss, val=data)
        assert numbers(found) == [1, 1] and [midpoint.harms for midpoint in found.midpoints] == [harm]
        assert found.verdict.startswith("One basin: no barrier separates the 2 candidates.")
        said = "the midpoint of step-2.pt and step-1.pt has loss 1.1183, step-1.pt alone 1.0000. `ckptavg soup` leaves"
        assert (said in found.verdict) == harm


def test_compare_and_the_inspection_agree_on_two_candidates_without_an_interval(tmp_path: Path):
    """The midpoint lies above the mean of its ends by more than 2 %, but by less than three times their difference."""
    (tmp_path / "two").mkdir()
    for step, w in enumerate(([1.0, 0.0], [0.3, 1.1]), 1):
        torch.save({"w": torch.tensor(w)}, tmp_path / "two" / f"step-{step}.pt")
    task: dict[str, Any] = {"model": Ring, "val": [torch.ones(32)]}
    task["loss"] = lambda model, batch: ring_loss(model, batch).mean()
    found = basins(tmp_path / "two", **task)
    barrier = found.midpoints[0].barrier
    assert barrier is not None and barrier.low is None and "three times the difference of the two" in found.verdict
    assert barrier.value > 0.02 * 1.1 and not found.midpoints[0].separates
    compared = ckptavg.compare(tmp_path / "two", "swa,best", output=tmp_path / "out", **task)
    assert not any("--basin" in warning for warning in compared.warnings)


def test_compare_names_an_exploded_candidate_in_the_words_of_the_inspection(tmp_path: Path):
    (tmp_path / "ckpts").mkdir()
    for step, w in enumerate((0.9, 1.0, 30.0, 1.1), 1):
        torch.save({"w": torch.tensor([w, 0.0])}, tmp_path / "ckpts" / f"step-{step}.pt")
    task: dict[str, Any] = {"model": Ring, "loss": ring_loss, "val": [torch.linspace(0.9, 1.1, 32)]}
    words = "1 candidate has exploded (over 100 times worse than the median): leave out with --exclude 'step-3.pt'."
    assert words in basins(tmp_path / "ckpts", **task).verdict
    compared = ckptavg.compare(tmp_path / "ckpts", "swa,best", output=tmp_path / "out", **task)
    (warning,) = [warning for warning in compared.warnings if "has exploded" in warning]
    assert warning.startswith(f"{words} The mean of all 4 candidates has loss ")


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
