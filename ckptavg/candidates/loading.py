"""Read one candidate into a row of the matrix.

Shape suffix: D = elements of one dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptavg.candidates.flat import Flat, check_tied, present, read
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.integrity import not_finite
from ckptavg.errors import InputError


def read_row(checkpoint: Checkpoint, flat: Flat, row_D: Tensor) -> Tensor:
    """Read a checkpoint into ``row_D``, tensor by tensor; raises InputError for non-finite values."""
    for slot in flat.slots:
        name = present(slot.names, checkpoint.tensors)
        check_tied(checkpoint, slot.names, slot.range)
        read(checkpoint.spec(name), name, checkpoint.read_into, row_D[slot.start :][: slot.numel], slot.first)
    if not checkpoint.allow_nonfinite and not torch.isfinite(row_D).all():
        bad = next(s for s in flat.slots if not torch.isfinite(row_D[s.start :][: s.numel]).all())
        name = present(bad.names, checkpoint.tensors)
        raise not_finite(checkpoint, name) or InputError(
            f"its values overflow {str(row_D.dtype).removeprefix('torch.')}, its dtype in the task's model",
            path=checkpoint.path,
            tensor=name,
        )
    return row_D
