"""Language modelling: predict the next byte of the standard library's sources.

Shape suffixes: B = passages, L = bytes, E = width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from study.domains.attention import Block
from study.domains.sources import MODULES, text_of
from study.job import Batches, Domain, Job

WIDTH, LENGTH, SYMBOLS = 32, 32, 128
TRAIN, VAL, TEST = 1280, 300, 600


class Writer(nn.Module):
    """Language model: embedded bytes, two causal blocks, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(SYMBOLS, WIDTH)
        self.place_LE = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, 4, causal=True) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS))

    def forward(self, bytes_BL: Tensor) -> Tensor:
        x_BLE = self.bytes(bytes_BL) + self.place_LE
        for block in self.blocks:
            x_BLE = block(x_BLE)
        return self.head(x_BLE)


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return nats per byte for each passage."""
    (passage,) = batch
    logits = model(passage[:, :-1]).flatten(0, 1)
    each = nn.functional.cross_entropy(logits, passage[:, 1:].flatten(), reduction="none")
    return each.view(len(passage), -1).mean(dim=1)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def job(seed: int, _: Path | None) -> Job:
    codes = torch.tensor(list("".join(map(text_of, MODULES)).encode())).clamp(max=SYMBOLS - 1)
    passages = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(seed))
    train, val, test = order[: TRAIN + VAL + TEST].split([TRAIN, VAL, TEST])
    return Job(
        model=Writer,
        loss=loss,
        train=Batches(passages[train], size=32, shuffle=True),
        val=Batches(passages[val], size=50),
        test=Batches(passages[test], size=50),
        optimizer=optimizer,
        clip=1.0,
    )


DOMAIN = Domain(
    title="Text: language modelling of bytes",
    about="Passages of 33 bytes from the same sources, 1280 to train on; a causal transformer of two blocks, AdamW.",
    figure="− test loss, nats per byte",
    every=40,
    job=job,
)
