"""Tensors of the model that are copied from one candidate instead of being mixed."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ckptavg.candidates.flat import Slot, unique_tensors
from ckptavg.candidates.loading import ReadInto, Specs, check_tied, read
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.integrity import same_bytes
from ckptavg.errors import UsageError

Copies: TypeAlias = Mapping[
    str, int
]  # floating-point tensor → number of values: N if kept, 1 if all candidates share it


def copied_tensors(model: nn.Module, checkpoints: Sequence[Checkpoint]) -> Copies:
    """Return the floating-point tensors that are copied: those of `Checkpoint.kept`, and those that cannot change.

    These are buffers and, of several candidates, frozen parameters that are bit-equal in all of them. They need no
    product, which would be NaN where they are infinite, as masks are. A sharded model's parameters are mixed all the
    same.

    Raises:
        UsageError: if one of two tied tensors is kept, or a parameter of a sharded model.
    """
    specs, n = checkpoints[0].tensors, len(checkpoints)
    copies: dict[str, int] = {}
    for names, tensor in unique_tensors(model):
        stored = [name for name in names if name in specs]
        kept = [name for name in stored if name in checkpoints[0].kept]
        if not stored or not tensor.is_floating_point():
            continue
        is_parameter = isinstance(tensor, nn.Parameter)
        if kept and len(kept) < len(stored):
            other = next(name for name in stored if name not in kept)
            raise UsageError(f"--keep matches {kept[0]}, but not {other}, to which the model ties it")
        if kept and tensor.is_meta:
            raise UsageError(f"--keep matches {kept[0]}, a parameter, but --shard can keep buffers only")
        fixed = not is_parameter or (n > 1 and not tensor.requires_grad and not tensor.is_meta)
        if kept:
            copies |= dict.fromkeys(stored, n)
        elif fixed and same_bytes(checkpoints, stored[0]):
            copies |= dict.fromkeys(stored, 1)
    return copies


class Copied:
    """Tensors, floating point or not, with their values in each candidate, kept on the device."""

    def __init__(self, tensors: Sequence[tuple[tuple[str, ...], Tensor]], copies: Copies) -> None:
        self._tensors = tensors
        self._values: list[list[Tensor]] = [[] for _ in tensors]
        self._shared = [any(copies.get(name) == 1 for name in names) for names, _ in tensors]
        for _, tensor in tensors:
            tensor.data = torch.empty_like(tensor, memory_format=torch.contiguous_format)  # no view of a flat vector
            tensor.grad = None

    def read(self, checkpoint: Checkpoint) -> None:
        """Append the values of the next candidate."""
        for (names, tensor), values, shared in zip(self._tensors, self._values, self._shared, strict=True):
            if shared and values:
                values.append(values[0])
                continue
            check_tied(checkpoint, Slot(names, 0, tensor.numel()))
            values.append(torch.empty_like(tensor, requires_grad=False))
            read(names, checkpoint.tensors, checkpoint.read_into, values[-1])

    def freeze(self) -> None:
        """Turn gradients off."""
        for _, tensor in self._tensors:
            tensor.requires_grad_(False)

    def take(self, i: int | None) -> None:
        """Set the tensors to their values in candidate ``i``, if it is not None."""
        if i is None:
            return
        for (_, tensor), values in zip(self._tensors, self._values, strict=True):
            storage(tensor).copy_(values[i])

    def load(self, specs: Specs, read_into: ReadInto) -> None:
        """Set the tensors to those of another source."""
        for names, tensor in self._tensors:
            values = torch.empty_like(tensor, requires_grad=False)
            read(names, specs, read_into, values)
            storage(tensor).copy_(values)

    def targets(self) -> dict[str, Tensor]:
        """Return each tensor as a vector, by name."""
        return {name: storage(tensor).view(-1) for names, tensor in self._tensors for name in names}


def storage(tensor: Tensor) -> Tensor:
    """Return the tensor to write values through.

    A change of a buffer counts in its version, from which `ckptavg.tasks.model_state.ModelState` tells that its copy is
    out of date. Autograd records no change of a parameter.
    """
    return tensor.data if isinstance(tensor, nn.Parameter) else tensor.detach()
