"""A training job that logs its calls: two moons, BatchNorm, and a loss with its own random numbers.

``LOG`` names a file that gets a letter for each batch: v for the first of a scoring pass, s for its others, b for
BatchNorm's, g for a gradient's. ``STOP=N:SIGNAL`` sends this process a signal at the N-th letter it writes; ``WORKERS``
is the loaders' number of workers, ``DATA`` the seed of the validation data, and ``PLAIN`` leaves BatchNorm out.
``MUTATION`` is for `faults.mutations`, at the moment ``load``, when the candidates are open and not yet loaded, or
``learn``, when they are loaded.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ckptavg.tasks.templates import task

TRAINING = 10_000  # examples from this index on are training data
metric_bounds = (0.0, 1.0)
_written = 0


def model() -> nn.Module:
    _moment("load")
    norm = nn.Identity() if "PLAIN" in os.environ else nn.BatchNorm1d(16)
    return nn.Sequential(nn.Linear(2, 16), norm, nn.ReLU(), nn.Linear(16, 2))


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    _moment("learn")
    inputs, labels, numbers = batch
    first = int(numbers.min())
    _tell("g" if torch.is_grad_enabled() else "b" if first >= TRAINING else "v" if first == 0 else "s")
    noisy = inputs + 0.1 * torch.randn_like(inputs)
    return nn.functional.cross_entropy(model(noisy), labels, reduction="none")


def metric(model: nn.Module, batch: list[Tensor]) -> Tensor:
    inputs, labels, _ = batch
    return (model(inputs).argmax(dim=1) == labels).float()


def train_dataloader() -> DataLoader:
    return _loader(300, 0, TRAINING, shuffle=True)


def val_dataloader() -> DataLoader:
    return _loader(250, int(os.environ.get("DATA", "1")), 0)


def test_dataloader() -> DataLoader:
    return _loader(250, 2, 1)


def _loader(count: int, seed: int, start: int, *, shuffle: bool = False) -> DataLoader:
    moons, labels = task._two_moons(count, seed).tensors
    data = TensorDataset(moons, labels, torch.arange(start, start + count))
    return DataLoader(data, batch_size=50, shuffle=shuffle, num_workers=int(os.environ.get("WORKERS", "0")))


def _moment(name: str) -> None:
    asked = os.environ.get("MUTATION", "")
    if asked.startswith(f"{name}:"):
        from faults.mutations import mutate

        mutate(asked)


def _tell(letter: str) -> None:
    global _written
    if "LOG" in os.environ:
        with Path(os.environ["LOG"]).open("a") as file:
            file.write(letter)
    _written += 1
    at, _, name = os.environ.get("STOP", "0:").partition(":")
    if _written == int(at):
        os.kill(os.getpid(), signal.Signals[name])


def train(folder: Path, checkpoints: int = 8) -> None:
    """Save one checkpoint per pass."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    for step in range(1, checkpoints + 1):
        for batch in train_dataloader():
            optimizer.zero_grad()
            loss(network, batch).mean().backward()
            optimizer.step()
        torch.save(network.state_dict(), folder / f"step-{step}.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
