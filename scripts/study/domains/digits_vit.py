"""Image classification: a small vision transformer on digits with label noise.

Shape suffixes: B = examples, L = patches, E = width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from study.domains.attention import Block
from study.domains.digits import digits
from study.job import Domain, Job, accuracy, cross_entropy

WIDTH: Final = 32


class ViT(nn.Module):
    """Vision transformer: 2 × 2 patches of an 8 × 8 image, two blocks, and a classifier of their mean output."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.place_LE = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, 4, causal=False) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, images: Tensor) -> Tensor:
        x_BLE = self.patches(images).flatten(2).transpose(1, 2) + self.place_LE
        for block in self.blocks:
            x_BLE = block(x_BLE)
        return self.head(x_BLE.mean(dim=1))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)


def job(seed: int, _: Path | None) -> Job:
    train, val, test = digits(seed)
    return Job(
        model=ViT, loss=cross_entropy, metric=accuracy, train=train, val=val, test=test, optimizer=optimizer, clip=1.0
    )


DOMAIN = Domain(
    title="Images: digits, small ViT",
    about="The same digits and noise; a vision transformer of two blocks with LayerNorm, AdamW.",
    figure="test accuracy, %",
    scale=100,
    every=40,
    job=job,
)
