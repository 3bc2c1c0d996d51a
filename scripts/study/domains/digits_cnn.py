"""Image classification: a convolutional network with BatchNorm on digits with label noise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from study.domains.digits import digits
from study.job import Domain, Job, accuracy, cross_entropy


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-3)


def job(seed: int, _: Path | None) -> Job:
    train, val, test = digits(seed)
    return Job(model=model, loss=cross_entropy, metric=accuracy, train=train, val=val, test=test, optimizer=optimizer)


DOMAIN = Domain(
    title="Images: digits, CNN with BatchNorm",
    about="scikit-learn's digits, a fifth of the 997 training labels random; two convolutions with BatchNorm, SGD.",
    figure="test accuracy, %",
    scale=100,
    every=30,
    job=job,
)
