"""The model as one flat vector per dtype, into which its parameters and their gradients are views.

Complex tensors are pairs of real elements: autograd's gradient ∂ℓ/∂Re w + i ∂ℓ/∂Im w is that of the pairs.

Shape suffixes: D = elements of one dtype (parameters first, then floating-point buffers), Q = parameters among them.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from ckptavg.coefficients import Groups, group_of


@dataclass(frozen=True)
class Slot:
    """Position, in real numbers, of one unique tensor of the model, or of this rank's shard of it, in the vector."""

    names: tuple[str, ...]  # more than one if tied
    start: int  # index of its first element in the vector
    numel: int  # number of its elements in the vector
    first: int = 0  # index of the first of these elements in the full tensor


@dataclass(frozen=True)
class Flat:
    """Parameters, buffers and gradients of one dtype."""

    weights_D: Tensor
    gradient_Q: Tensor  # accumulated by backward passes
    slots: tuple[Slot, ...]  # position of each tensor
    shards: tuple[tuple[nn.Parameter, Tensor], ...] = ()  # sharded parameters, each with its view into weights_D

    def push(self) -> None:
        """Copy values to shards that are not views into ``weights_D``: FSDP2 pads a shard shorter than the others."""
        for parameter, values in self.shards:
            local: Tensor = parameter.detach().to_local()  # pyright: ignore  # a DTensor
            if local.data_ptr() != values.data_ptr():
                local.copy_(values)


def overlapping(slots: Sequence[Slot], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (slot index, start, stop) for each slot that overlaps the elements from ``start`` to ``stop``."""
    for k in range(bisect_right(slots, start, key=lambda slot: slot.start + slot.numel), len(slots)):
        if slots[k].start >= stop:
            return
        if slots[k].numel:
            yield k, max(start, slots[k].start), min(stop, slots[k].start + slots[k].numel)


@lru_cache(maxsize=16)  # called twice per step with the same arguments
def runs(slots: tuple[Slot, ...], groups: Groups, stop: int) -> Sequence[tuple[int, int, int]]:
    """Return (start, stop, group) of the runs of consecutive slots in one group, which end at ``stop``."""
    before_stop = (slot for slot in slots if slot.start < stop)
    starts = [(next(run).start, g) for g, run in groupby(before_stop, lambda slot: group_of(slot.names[0], groups))]
    return [(begin, end, g) for (begin, g), (end, _) in pairwise([*starts, (stop, -1)]) if begin < end]


def flatten(tensors: list[tuple[tuple[str, ...], Tensor]]) -> Flat:
    """Replace the storage of tensors of one dtype, and of their gradients, by flat vectors; values are discarded."""
    tensors = sorted(tensors, key=lambda item: not isinstance(item[1], nn.Parameter))  # parameters first
    example = tensors[0][1]
    dtype, device = example.dtype.to_real(), example.device
    weights_D = torch.empty(sum(real_numel(tensor) for _, tensor in tensors), dtype=dtype, device=device)
    trained = sum(real_numel(tensor) for _, tensor in tensors if isinstance(tensor, nn.Parameter))
    gradient_Q = torch.zeros(trained, dtype=dtype, device=device)
    slots: list[Slot] = []
    start = 0
    for names, tensor in tensors:
        stop = start + real_numel(tensor)
        if isinstance(tensor, nn.Parameter):
            tensor.grad = _shaped(gradient_Q[start:stop], tensor)
        tensor.data = _shaped(weights_D[start:stop], tensor)
        slots.append(Slot(names, start, stop - start))
        start = stop
    return Flat(weights_D, gradient_Q, tuple(slots))


def _shaped(vector: Tensor, like: Tensor) -> Tensor:
    """Return a view of a real vector with the shape of ``like``, which may be complex."""
    if like.is_complex():
        return torch.view_as_complex(vector.view(*like.shape, 2))
    return vector.view(like.shape)


def is_mixable(tensor: Tensor) -> bool:
    """Return whether a tensor can be averaged: it is floating point or complex, and not sparse."""
    return tensor.layout == torch.strided and (tensor.is_floating_point() or tensor.is_complex())


def as_real(tensor: Tensor) -> Tensor:
    """Return a view of a complex tensor as a real one with a last dimension of 2; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def real_numel(tensor: Tensor) -> int:
    """Return the number of real elements: two for each complex one."""
    return 2 * tensor.numel() if tensor.is_complex() else tensor.numel()


def unique_tensors(model: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
    """Return every distinct tensor of the state dict with all of its names."""
    by_id: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):  # get_extra_state may return any object
            by_id.setdefault(id(tensor), ([], tensor))[0].append(name)
    return [(tuple(names), tensor) for names, tensor in by_id.values()]
