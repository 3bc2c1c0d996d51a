"""The template's task with class probabilities, from which reliability diagrams are drawn."""

import torch

from ckptavg.tasks.templates.task import *  # noqa: F403


def predict(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Return probabilities [B, 2]."""
    return model(batch[0]).softmax(dim=1)


metric_key = "metric"
metric_bounds = None
