"""Cached batches are read once, equal for every mixture, and unaffected by losses that change them in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import stored
from torch import Tensor, nn

from ckptavg.batches import cache as cache_module
from ckptavg.batches.cache import BatchCache
from ckptavg.batches.loader import BatchLoader
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.cost import CostMeter
from ckptavg.objective.mixture import Mixture
from ckptavg.score import Split
from ckptavg.tasks import Task
from ckptavg.tasks.batch import Batch

CPU = torch.device("cpu")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Job(Task):
    """Task that records each read of a split; its batches and its loss's noise use the global generator."""

    source, metric, metric_goal, metric_bounds, corpus, whole = "toy", None, "max", None, None, None
    metric_key, predict = None, None

    def __init__(self, spoil: str = "") -> None:
        self.read: list[Split] = []
        self._spoil = spoil

    def model(self) -> nn.Module:
        return network()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        y = batch.pop("y") if self._spoil == "containers" else batch["y"]
        if self._spoil == "tensors":
            batch["x"].mul_(2)
        elif self._spoil == "memory":  # unnoticed by autograd
            x = batch["x"].numpy()
            x *= 2
        noise = torch.randn(len(y), 1)
        return nn.functional.cross_entropy(model(batch["x"] + noise), y, reduction="none")

    def has(self, split: Split) -> bool:
        return split in ("val", "train")

    def batches(self, split: Split) -> Iterator[Any]:
        self.read.append(split)
        buffer = torch.empty(5, 3)  # shared by all batches, as in a loader that reuses its memory
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
    mixture = Mixture(task, checkpoints, Run(device=CPU))  # pyright: ignore[reportArgumentType]
    return [mixture.score(Coefficients.uniform(chosen, 4)).value for chosen in ([0], [0, 1], [1, 2, 3], [3])]


@pytest.fixture
def read_each_time(checkpoints: tuple[Checkpoint, ...], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "HOST", 0)
        task = Job()
        values = scores(task, checkpoints)
        assert task.read == ["train", "val"] * 4
    return values


@pytest.mark.parametrize("spoil", ["", "containers"])
def test_a_split_is_read_once_and_scores_match_reading_it_each_time(
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
    values = scores(task, checkpoints)
    assert task.read == ["train", "val"]
    monkeypatch.setattr(cache_module, "HOST", 0)
    assert values == scores(Job(spoil), checkpoints)


def read_pass(cache: BatchCache, split: Split, *batches: Any) -> list[Any]:
    """Return the batches of a pass over a split whose source yields ``batches``."""
    return [entry.batch for entry in cache.passed(split, lambda: (Batch(batch, 1) for batch in batches))]


def test_a_split_that_is_too_large_is_read_again_and_frees_its_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "HOST", 100)
    cache = BatchCache(CPU)
    for fill in (1, 2, 3):
        assert [b.tolist() for b in read_pass(cache, "train", torch.full((10,), fill), torch.full((20,), fill))] == [
            [fill] * 10, [fill] * 20
        ]  # fmt: skip
    read_pass(cache, "val", torch.ones(25))
    assert read_pass(cache, "val")[0].tolist() == [1.0] * 25


def test_an_unfinished_pass_is_not_cached(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "HOST", 100)
    cache = BatchCache(CPU)
    for seen in cache.passed("val", lambda: iter([Batch(torch.zeros(25), 25), Batch(torch.zeros(2), 2)])):
        assert seen.size == 25
        break
    assert read_pass(cache, "val", torch.ones(25))[0].tolist() == read_pass(cache, "val")[0].tolist() == [1.0] * 25


def test_batches_with_their_own_to_method_are_not_cached():
    class Graph:
        def to(self, device: torch.device) -> Graph:
            return self

    cache = BatchCache(CPU)
    for graph in (Graph(), Graph()):
        assert read_pass(cache, "val", {"graph": graph, "y": torch.ones(2)})[0]["graph"] is graph


def test_batches_are_read_again_after_they_were_halved():
    task = Job()
    loader = BatchLoader(task, "val", Run(device=CPU), CostMeter())  # pyright: ignore[reportArgumentType]
    for halved, read in ((False, 1), (False, 1), (True, 2), (True, 3)):
        loader.restart(halved=halved)
        assert len(list(loader.scored("val"))) == 3 and task.read == ["val"] * read
