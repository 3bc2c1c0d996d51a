"""A small network on scikit-learn's handwritten digits, trained so that it is known which checkpoints average."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

_TRAINED = 1200  # digits; the others are for validation


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def val_dataloader() -> list[tuple[Tensor, Tensor]]:
    images, labels = _digits()
    return [(images[_TRAINED:], labels[_TRAINED:])]


def constant(step: int) -> float:
    return 0.1


def restarts(step: int) -> float:
    """A cosine from 0.5 to 0, anew every 100 steps."""
    return 0.25 * (1 + math.cos(math.pi * ((step - 1) % 100) / 100))


def train(
    folder: Path, saved: Collection[int], *, seed: int = 0, rate: Callable[[int], float] = constant, spike: int = 0
) -> Path:
    """Save the steps ``saved``; after the step ``spike`` noise of twice its spread is added to each parameter."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    network, (images, labels) = model().double(), _digits()  # the rounding of another processor changes nothing
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, max(saved) + 1):
        optimizer.param_groups[0]["lr"] = rate(step)
        chosen = torch.randint(0, _TRAINED, (64,))
        optimizer.zero_grad()
        loss(network, (images[chosen].double(), labels[chosen])).mean().backward()
        optimizer.step()
        for parameter in network.parameters() if step == spike else ():
            parameter.data += 2 * parameter.data.std() * torch.randn_like(parameter)
        if step in saved:
            state = {name: parameter.detach().float() for name, parameter in network.named_parameters()}
            torch.save(state, folder / f"step-{step}.pt")
    return folder


def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
