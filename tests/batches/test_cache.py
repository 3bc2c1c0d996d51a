"""Batches that stay on the device: read once, the same for every mixture, and never spoilt by who uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import stored
from torch import Tensor, nn

from ckptavg.batches import cache as kept_module
from ckptavg.batches.cache import BatchCache
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.objective.mixture import Mixture
from ckptavg.score import Split

CPU = torch.device("cpu")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Job:
    """Counts how often it is read; its batches and the noise that its loss adds come from the global generator."""

    source, metric, metric_goal, metric_bounds, corpus, whole = "toy", None, "max", None, None, None

    def __init__(self, spoil: str = "") -> None:
        self.read: list[Split] = []
        self._spoil = spoil

    def model(self) -> nn.Module:
        return network()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        y = batch.pop("y") if self._spoil == "containers" else batch["y"]
        if self._spoil == "tensors":
            batch["x"].mul_(2)
        elif self._spoil == "memory":  # which autograd does not notice
            x = batch["x"].numpy()
            x *= 2
        noise = torch.randn(len(y), 1)
        return nn.functional.cross_entropy(model(batch["x"] + noise), y, reduction="none")

    def has(self, split: Split) -> bool:
        return split in ("val", "train")

    def batches(self, split: Split) -> Iterator[Any]:
        self.read.append(split)
        buffer = torch.empty(5, 3)  # one for all batches, as a loader that reuses its memory has
        for _ in range(3):
            yield {"x": buffer.copy_(torch.randn(5, 3)), "y": torch.randint(2, (5,)), "names": ["a"] * 5}

    def examples(self, split: Split) -> int | None:
        return None

    def length(self, split: Split) -> int | None:
        return 3

    def halve(self) -> bool:
        return False


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Checkpoint, ...]:
    torch.manual_seed(0)
    return stored(tmp_path, [network().state_dict() for _ in range(4)])


def scores(task: Job, checkpoints: tuple[Checkpoint, ...]) -> list[float]:
    mixture = Mixture(task, checkpoints, device=CPU)  # pyright: ignore[reportArgumentType]
    return [mixture.score(Coefficients.uniform(chosen, 4)).value for chosen in ([0], [0, 1], [1, 2, 3], [3])]


@pytest.fixture
def read_each_time(checkpoints: tuple[Checkpoint, ...], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    with monkeypatch.context() as patch:
        patch.setattr(kept_module, "HOST", 0)
        task = Job()
        found = scores(task, checkpoints)
        assert task.read == ["train", "val"] * 4
    return found


@pytest.mark.parametrize("spoil", ["", "containers"])
def test_a_split_is_read_once_and_scores_are_those_of_reading_it_each_time(
    checkpoints: tuple[Checkpoint, ...], read_each_time: list[float], spoil: str
):
    task = Job(spoil)
    assert scores(task, checkpoints) == read_each_time
    assert task.read == ["train", "val"]


@pytest.mark.parametrize("spoil", ["tensors", "memory"])
def test_a_loss_may_change_its_batch_in_place(
    checkpoints: tuple[Checkpoint, ...], monkeypatch: pytest.MonkeyPatch, spoil: str
):
    task = Job(spoil)
    found = scores(task, checkpoints)
    assert task.read == ["train", "val"]
    monkeypatch.setattr(kept_module, "HOST", 0)
    assert found == scores(Job(spoil), checkpoints)


def passed(kept: BatchCache, split: Split, *batches: Any) -> list[Any]:
    """The batches of a pass over a split that has these if it is read."""
    return [one.batch for one in kept.passed(split, lambda: iter(batches))]


def test_what_is_too_large_is_read_again_and_takes_no_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept_module, "HOST", 100)
    kept = BatchCache(CPU)
    for fill in (1, 2, 3):
        assert [b.tolist() for b in passed(kept, "train", torch.full((10,), fill), torch.full((20,), fill))] == [
            [fill] * 10, [fill] * 20
        ]  # fmt: skip
    passed(kept, "val", torch.ones(25))
    assert passed(kept, "val")[0].tolist() == [1.0] * 25


def test_a_pass_that_is_not_finished_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept_module, "HOST", 100)
    kept = BatchCache(CPU)
    for seen in kept.passed("val", lambda: iter([torch.zeros(25), torch.zeros(2)])):
        assert seen.size == 25
        break
    assert passed(kept, "val", torch.ones(25))[0].tolist() == passed(kept, "val")[0].tolist() == [1.0] * 25


def test_what_moves_itself_is_not_kept():
    class Graph:
        def to(self, device: torch.device) -> Graph:
            return self

    kept = BatchCache(CPU)
    for graph in (Graph(), Graph()):
        assert passed(kept, "val", {"graph": graph, "y": torch.ones(2)})[0]["graph"] is graph


def test_batches_that_become_others_are_forgotten():
    kept = BatchCache(CPU)
    passed(kept, "val", torch.ones(2))
    kept.forget()
    assert passed(kept, "val", torch.zeros(1))[0].tolist() == passed(kept, "val")[0].tolist() == [0.0]
