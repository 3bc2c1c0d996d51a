"""A training job of the study: what a domain gives for one seed, and what its task file shows to ckptavg."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SCRIPTS: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Job:
    """Model, data and optimizer of one training.

    Attributes:
        model: makes the module; its initial weights come from torch's global generator.
        loss: one value for each example.
        train: the batches of an epoch, which may be shuffled by torch's global generator; val and test likewise.
        optimizer: for the base training.
        metric: one value for each example, larger is better, or None: then strategies are scored by the loss.
        figure: a final figure of merit that no strategy sees, larger is better; None takes the test score.
        clip: largest norm of the gradient in the base training.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    train: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    metric: Callable[[nn.Module, Any], Tensor] | None = None
    figure: Callable[[nn.Module], float] | None = None
    clip: float | None = None


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A kind of job.

    Attributes:
        title: a heading.
        about: one sentence or two: data, model, what is noisy.
        figure: what the test figure is called, and its unit.
        scale: that figure is shown multiplied by this.
        every: optimizer steps between two checkpoints.
        job: of a seed, and of a path for domains that read data of the user's.
        needs_data: whether it reads data of the user's.
    """

    title: str
    about: str
    figure: str
    scale: float = 1.0
    every: int
    job: Callable[[int, Path | None], Job]
    needs_data: bool = False


class Batches:
    """Tensors cut into batches: a DataLoader without its cost for each example, which would dwarf these networks."""

    def __init__(self, *tensors: Tensor, size: int, shuffle: bool = False) -> None:
        self.dataset = TensorDataset(*tensors)
        self._size = size
        self._shuffle = shuffle

    def __len__(self) -> int:
        """A last batch that is not full is left out when shuffled: BatchNorm weighs every batch alike."""
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
    """1 for each example that is right."""
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


def train_dataloader():
    return job.train


def val_dataloader():
    return job.val


def test_dataloader():
    return job.test
''',
        encoding="utf-8",
    )
