"""A training job of the study: model and data of a domain for one seed, and the task file that ckptavg reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SCRIPTS: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Training:
    """Where and how a job is trained.

    Attributes:
        folder: directory for the checkpoints; it does not exist.
        steps: optimizer steps.
        every: steps between two checkpoints.
        schedule: learning-rate schedule, one of the domain's.
        seed: seed of the initial weights and the order of the batches.
        device: device to train on.
    """

    folder: Path
    steps: int
    every: int
    schedule: str
    seed: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Job:
    """Model, data and optimizer of one training.

    Attributes:
        model: builds the module; its initial weights come from torch's global generator.
        loss: one value per example.
        train: the batches of an epoch, optionally shuffled by torch's global generator; val and test likewise.
        optimizer: optimizer of the base training.
        metric: one value per example, larger is better; None scores strategies by the loss.
        figure: final figure of merit, not available to strategies, larger is better; of a mapping the first is that
            figure, the others are reported beside it; None takes the test score.
        clip: maximum gradient norm in the base training.
        forward: one pass of the model over a batch, if loss and metric call the model just for this; both are then
            scored from it.
        sample: the training batches that strategies see, for BatchNorm statistics and on=train; None is ``train``.
        run: trains in a way of its own and writes ``step-N`` checkpoints; returns label → file of a state dict for
            averages that another tool made during the training. None is `study.training.train`.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    train: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    metric: Callable[[nn.Module, Any], Tensor] | None = None
    figure: Callable[[nn.Module], float | Mapping[str, float]] | None = None
    clip: float | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    sample: Iterable[Any] | None = None
    run: Callable[[Training], Mapping[str, Path]] | None = None


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A kind of job.

    Attributes:
        title: heading in the report.
        area: what it is evidence for, under which the first table counts it; empty for the toys of the appendix.
        about: one or two sentences on data, model and noise.
        figure: name and unit of the test figure.
        scale: factor by which the test figure is multiplied for display.
        every: optimizer steps between two checkpoints.
        job: builds the job of a seed, and of a path for domains that read data of the user's.
        needs_data: whether it reads data of the user's.
        ordered: whether the checkpoints are of one training, in its order; else `last` and what weighs by position mean
            nothing, and the time of the training is not that of its parts.
        schedules: the learning-rate schedules, or other ways of training, that are told apart.
        sizes: attributes of the whole study's `Plan` that differ for this domain.
    """

    title: str
    area: str = ""
    about: str
    figure: str
    scale: float = 1.0
    every: int
    job: Callable[[int, Path | None], Job]
    needs_data: bool = False
    ordered: bool = True
    schedules: tuple[str, ...] = ("constant", "cosine")
    sizes: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Batches:
    """Tensors cut into batches: a DataLoader without the cost per example, which would dominate for these networks."""

    def __init__(self, *tensors: Tensor, size: int, shuffle: bool = False) -> None:
        self.dataset = TensorDataset(*tensors)
        self._size = size
        self._shuffle = shuffle

    def __len__(self) -> int:
        """Return the number of batches; shuffling drops an incomplete last batch: BatchNorm weighs batches equally."""
        whole, rest = divmod(len(self.dataset), self._size)
        return whole + bool(rest and not self._shuffle)

    def __iter__(self) -> Iterator[list[Tensor]]:
        count = len(self.dataset)
        order = torch.randperm(count) if self._shuffle else torch.arange(count)
        for chosen in order.split(self._size)[: len(self)]:
            yield [tensor[chosen] for tensor in self.dataset.tensors]


def cross_entropy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels, reduction="none")


def accuracy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return 1 for each correctly classified example."""
    inputs, labels = batch
    return (model(inputs).argmax(dim=-1) == labels).float()


def write_task(path: Path, domain: str, seed: int, data: Path | None) -> None:
    """Write the ckptavg task file of one job; it can be used by hand, as ``ckptavg compare CKPTS --task FILE``."""
    given = None if data is None else str(data.resolve())
    path.write_text(
        f'''"""The task of one training of the study: {domain}, seed {seed}."""

import sys
from pathlib import Path

sys.path.insert(0, {str(SCRIPTS)!r})
from study.domains import domain

DATA = {given!r}
job = domain({domain!r}).job({seed}, DATA and Path(DATA))
model, loss, metric = job.model, job.loss, job.metric
if job.forward is not None:

    def forward(model, batch):
        return job.forward(model, batch)

    def loss(output, batch):
        return job.loss(lambda *_, **__: output, batch)

    def metric(output, batch):
        return job.metric(lambda *_, **__: output, batch)


def train_dataloader():
    return job.train if job.sample is None else job.sample


def val_dataloader():
    return job.val


def test_dataloader():
    return job.test
''',
        encoding="utf-8",
    )
