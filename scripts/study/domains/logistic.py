"""Logistic regression on synthetic data: the convex case, which the theory covers.

Shape suffixes: B = examples, F = features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from study.job import Batches, Domain, Job, accuracy, cross_entropy

FEATURES = 40
TRAIN, VAL, TEST = 1000, 500, 2000


def model() -> nn.Module:
    return nn.Linear(FEATURES, 2)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=1e-3)


def job(seed: int, _: Path | None) -> Job:
    random = torch.Generator().manual_seed(seed)
    total = TRAIN + VAL + TEST
    x_BF = torch.randn(total, FEATURES, generator=random)
    direction_F = torch.randn(FEATURES, generator=random) * 2 / FEATURES**0.5
    label_B = (torch.rand(total, generator=random) < torch.sigmoid(x_BF @ direction_F)).long()

    def part(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return x_BF[start:stop], label_B[start:stop]

    return Job(
        model=model,
        loss=cross_entropy,
        metric=accuracy,
        train=Batches(*part(0, TRAIN), size=10, shuffle=True),
        val=Batches(*part(TRAIN, TRAIN + VAL), size=250),
        test=Batches(*part(TRAIN + VAL, total), size=1000),
        optimizer=optimizer,
    )


DOMAIN = Domain(
    title="Convex: logistic regression",
    about="40 normal features, labels drawn from a logistic model, 1000 to train on; SGD in batches of ten.",
    figure="test accuracy, %",
    scale=100,
    every=50,
    job=job,
)
