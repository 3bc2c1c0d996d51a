"""Full check of a checkpoint: checksums, booleans, and no NaN or infinite weight."""

import math

import torch
from torch import Tensor

from ckptavg.checkpoints.checkpoint import Checkpoint, chunks
from ckptavg.checkpoints.dtypes import FLOATING, TORCH
from ckptavg.errors import InputError


def check(checkpoint: Checkpoint) -> None:
    """Read every tensor once.

    Raises:
        InputError: if a checksum does not match, a BOOL is neither 0 nor 1, a value is NaN or infinite without
            ``allow_nonfinite``, or the file changed since it was opened.
    """
    first_names = {checkpoint.spec(name): name for name in reversed(checkpoint.names)}  # tied tensors once
    for spec, name in sorted(first_names.items(), key=lambda item: (item[0].record, item[0].offset)):
        checked = spec.dtype in FLOATING and not checkpoint.allow_nonfinite
        for _, chunk in chunks(spec, name, checkpoint.read_into):
            bad = checked and not is_finite(torch.frombuffer(chunk, dtype=TORCH[spec.dtype]))
            if bad and (error := not_finite(checkpoint, name)):
                raise error
    checkpoint.check_unchanged()


def is_finite(values: Tensor) -> bool:
    """Return whether all elements of ``values`` (not empty) are finite."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(values))  # 20 × as fast as isfinite().all()


def not_finite(checkpoint: Checkpoint, name: str) -> InputError | None:
    """Return the error for a tensor with NaN or infinite values: their number and the first; None if it has none."""
    count, first = 0, -1
    spec = checkpoint.spec(name)
    for start, chunk in chunks(spec, name, checkpoint.read_into):
        bad = ~torch.frombuffer(chunk, dtype=TORCH[spec.dtype]).isfinite()
        if first < 0 and bad.any():
            first = start + int(bad.int().argmax())
        count += int(bad.sum())
    if not count:
        return None
    what = f"{count} values are NaN or infinite, the first at element {first}"
    return InputError(what, path=checkpoint.path, tensor=name, hint=checkpoint.hint)
