"""A network with BatchNorm on two interleaved half circles, and the training that saves its checkpoints."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path

import torch
from torch import nn

from ckptavg.tasks.templates.task import *  # noqa: F403
from ckptavg.tasks.templates.task import loss, train_dataloader


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 2))


def train(folder: Path) -> None:
    torch.manual_seed(1)
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9)
    for step, batch in enumerate(islice(cycle(train_dataloader()), 30), 1):
        optimizer.zero_grad()
        loss(network, batch).mean().backward()
        optimizer.step()
        if step % 6 == 0:
            torch.save(network.state_dict(), folder / f"step-{step}.pt")
