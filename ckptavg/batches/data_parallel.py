"""Check whether ranks can divide the examples of a batch: its loss must equal the mean of its parts' losses."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ckptavg.batches.stream import share
from ckptavg.errors import TaskError
from ckptavg.runtime.workers import Workers
from ckptavg.tasks import batch as batches
from ckptavg.tasks.batch import Batch


def obstacle(loss: Callable[[Any], Tensor], batch: Batch, device: torch.device, workers: Workers) -> str | None:
    """Return the reason why a batch like this one cannot be divided; None if it can.

    A loss over pairs of examples, a mean over tokens instead of examples, or a loss that draws random numbers changes
    when it is combined from parts, and a step on it would differ from that of a single process.

    Args:
        loss: returns the loss of a batch at some weights.
        batch: a batch from the loader, the same on all ranks.
        workers: the ranks that would divide it.
    Raises:
        TaskError: if the loss of the whole batch fails.
    """
    with torch.no_grad():
        whole = loss(batches.to_device(batch.data, device)).mean()
        try:
            part, weight = share(batch.data, batch.size, workers.rank, workers.world_size)
            local = weight * float(loss(batches.to_device(part, device)).mean())
        except (TypeError, TaskError):
            local = math.nan
    combined = math.fsum(workers.gather(local))
    if math.isnan(combined):
        return "a batch cannot be split into parts"
    # rounding differences are a few ulps; any other cause makes a larger difference than this tolerance
    close = math.isclose(combined, float(whole), rel_tol=torch.finfo(whole.dtype).eps ** 0.5)
    return None if workers.broadcast(close) else "the loss of a batch is not the mean of its examples' losses"
