"""The MLP's task with two metrics by name and metrics of class probabilities, without test data."""

from __future__ import annotations

import torch
from jobs.mlp import loss, model, train_dataloader
from torch import Tensor, nn

from ckptavg.tasks.templates.task import val_dataloader

__all__ = ["loss", "model", "train_dataloader", "val_dataloader"]


def metric(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    logits = model(batch[0])
    return {"margin": logits.amax(dim=1), "mean margin": logits.amax(dim=1).mean()}


def predict(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return torch.softmax(model(batch[0]), dim=1)


metric_key = "ece"
metric_goal = {"margin": "min"}
