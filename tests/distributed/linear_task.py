"""Logistic regressions of parts of the same data, in batches of two sizes, and their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

draws = torch.Generator().manual_seed(0)
INPUTS = torch.randn(75, 6, generator=draws, dtype=torch.float64)
LABELS = (INPUTS.sum(dim=1) + torch.randn(75, generator=draws, dtype=torch.float64) > 0).double()


def model() -> nn.Module:
    return nn.Linear(6, 1, dtype=torch.float64)


def loss(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch[0]).squeeze(-1)
    return nn.functional.binary_cross_entropy_with_logits(outputs, batch[1], reduction="none")


def val_dataloader() -> list[tuple[Tensor, Tensor]]:
    return list(zip(INPUTS.split(30), LABELS.split(30), strict=True))


def save(folder: Path) -> None:
    for step in range(1, 6):
        torch.manual_seed(step)
        torch.save(model().state_dict(), folder / f"step-{step}.pt")
