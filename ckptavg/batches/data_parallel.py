"""May workers divide the examples of a batch? Where its loss is the mean of its parts' losses, and that is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ckptavg.batches.stream import share
from ckptavg.errors import TaskError
from ckptavg.runtime.workers import Workers
from ckptavg.tasks import batch as batches


def obstacle(loss: Callable[[Any], Tensor], batch: Any, device: torch.device, workers: Workers) -> str | None:
    """Why a batch like this one cannot be divided; None if it can.

    A loss over pairs of examples, one that is a mean over tokens instead of examples, or one that draws random numbers
    is another when it is put together from parts. A step on it would not be the one that a single process takes.

    Args:
        loss: of a batch, at some weights.
        batch: as the loader gives it, the same for all workers.
        device: where batches go.
        workers: who would divide it.
    Raises:
        TaskError: if the loss of the whole batch cannot be had.
    """
    with torch.no_grad():
        whole = loss(batches.to_device(batch, device)).mean()
        try:
            part, weight = share(batch, workers.rank, workers.world_size)
            mine = weight * float(loss(batches.to_device(part, device)).mean())
        except (TypeError, TaskError):
            mine = math.nan
    together = math.fsum(workers.gather(mine))
    if math.isnan(together):
        return "a part of a batch is no batch"
    # roundings of the two are some ulps, and whatever else makes a difference makes one that is larger than this
    close = math.isclose(together, float(whole), rel_tol=torch.finfo(whole.dtype).eps ** 0.5)
    return None if workers.broadcast(close) else "the loss of a batch is not the mean of its examples' losses"
