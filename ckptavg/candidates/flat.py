"""The model as one flat vector per dtype, into which its parameters and their gradients are views.

Shape suffixes: D = elements of one dtype (parameters first, then floating-point buffers), Q = parameters among them.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor, nn

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import FLOATING, TORCH
from ckptavg.coefficients import Groups, group_of
from ckptavg.errors import InputError, TaskError
from ckptavg.readers import ITEM_SIZE, StoredTensor

_CHUNK: Final = 8 << 20  # bytes per read
ReadInto = Callable[[str, int, memoryview], None]


@dataclass(frozen=True)
class Slot:
    """Position of one unique tensor of the model, or of this rank's shard of it, in the flat vector.

    Attributes:
        names: its names, more than one if tied.
        start: index of its first element in the vector.
        numel: number of its elements in the vector.
        first: index of the first of these elements in the full tensor.
    """

    names: tuple[str, ...]
    start: int
    numel: int
    first: int = 0

    @property
    def range(self) -> range:
        """Indices of its elements in the full tensor."""
        return range(self.first, self.first + self.numel)


@dataclass(frozen=True)
class Flat:
    """Parameters, buffers and gradients of one dtype.

    Attributes:
        weights_D: the values.
        gradient_Q: the gradient, accumulated by backward passes.
        slots: position of each tensor.
        shards: the sharded parameters, each with its view into ``weights_D``.
    """

    weights_D: Tensor
    gradient_Q: Tensor
    slots: tuple[Slot, ...]
    shards: tuple[tuple[nn.Parameter, Tensor], ...] = ()

    def push(self) -> None:
        """Copy values to shards that are not views into ``weights_D``: FSDP2 pads a shard shorter than the others."""
        for parameter, values in self.shards:
            local: Tensor = parameter.detach().to_local()  # pyright: ignore  # a DTensor
            if local.data_ptr() != values.data_ptr():
                local.copy_(values)

    def cut(self, part: slice, groups: Groups, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, group) of the runs within ``part``; they cover all of its elements before ``stop``."""
        runs = _segments(self.slots, groups, stop)
        for begin, end, g in runs[bisect_right(runs, part.start, key=lambda run: run[1]) :]:
            if begin >= part.stop:
                return
            yield max(begin, part.start), min(end, part.stop), g


def overlapping(slots: Sequence[Slot], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (slot index, start, stop) for each slot that overlaps the elements from ``start`` to ``stop``."""
    for k in range(bisect_right(slots, start, key=lambda slot: slot.start + slot.numel), len(slots)):
        if slots[k].start >= stop:
            return
        if slots[k].numel:
            yield k, max(start, slots[k].start), min(stop, slots[k].start + slots[k].numel)


@lru_cache(maxsize=16)  # called twice per step with the same arguments
def _segments(slots: tuple[Slot, ...], groups: Groups, stop: int) -> Sequence[tuple[int, int, int]]:
    segments: list[tuple[int, int, int]] = []
    begin, current = 0, -1
    for slot in slots:
        if slot.start >= stop:
            break
        if (g := group_of(slot.names[0], groups)) != current:
            if slot.start > begin:
                segments.append((begin, slot.start, current))
            begin, current = slot.start, g
    if begin < stop:
        segments.append((begin, stop, current))
    return segments


def flatten(tensors: list[tuple[tuple[str, ...], Tensor]]) -> Flat:
    """Replace the storage of tensors of one dtype, and of their gradients, by flat vectors; values are discarded."""
    tensors = sorted(tensors, key=lambda item: not isinstance(item[1], nn.Parameter))  # parameters first
    example = tensors[0][1]
    weights_D = example.new_empty(sum(tensor.numel() for _, tensor in tensors), requires_grad=False)
    trained = sum(tensor.numel() for _, tensor in tensors if isinstance(tensor, nn.Parameter))
    gradient_Q = torch.zeros(trained, dtype=example.dtype, device=example.device)
    slots: list[Slot] = []
    start = 0
    for names, tensor in tensors:
        stop = start + tensor.numel()
        if isinstance(tensor, nn.Parameter):
            tensor.grad = gradient_Q[start:stop].view(tensor.shape)
        tensor.data = weights_D[start:stop].view(tensor.shape)
        slots.append(Slot(names, start, tensor.numel()))
        start = stop
    return Flat(weights_D, gradient_Q, tuple(slots))


def unique_tensors(model: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
    """Return every distinct tensor of the state dict with all of its names."""
    by_id: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):  # get_extra_state may return any object
            by_id.setdefault(id(tensor), ([], tensor))[0].append(name)
    return [(tuple(names), tensor) for names, tensor in by_id.values()]


def check_names(unique: list[tuple[tuple[str, ...], Tensor]], stored: Mapping[str, StoredTensor]) -> None:
    """Check that the model's names, shapes and kinds of dtype (floating point or not) match the checkpoints'."""
    model_names = {name for names, _ in unique for name in names}
    extra = sorted(stored.keys() - model_names)
    missing = [names[0] for names, _ in unique if not any(name in stored for name in names)]
    if extra or missing:
        lists = [
            f"{label} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for label, names in (("it lacks", extra), ("only it has", missing))
            if names
        ]
        hint = "make model() the module whose state_dict() was saved, or choose the right part with --key"
        prefix = next((name.removesuffix(missing[0]) for name in extra if missing and name.endswith(missing[0])), "")
        if prefix and {f"{prefix}{name}" for name in missing} <= set(extra):
            hint = f"the checkpoints' names begin with {prefix}, as if model() were an attribute of what was saved"
        raise TaskError(f"the task's model() does not fit the checkpoints: {'; '.join(lists)}", hint=hint)
    for names, tensor in unique:
        name = present(names, stored)
        if stored[name].shape != tuple(tensor.shape):
            raise TaskError(
                f"the task's model() has {name} of shape {list(tensor.shape)}, "
                f"the checkpoints {list(stored[name].shape)}"
            )
        if (stored[name].dtype in FLOATING) != tensor.is_floating_point():
            raise TaskError(f"the task's model() has {name} as {tensor.dtype}, the checkpoints as {stored[name].dtype}")


def present(names: tuple[str, ...], stored: Mapping[str, StoredTensor]) -> str:
    """Return the first of a tensor's names that is in the file."""
    return next(name for name in names if name in stored)


def check_tied(checkpoint: Checkpoint, names: tuple[str, ...], elements: range) -> None:
    """Check that names tied in the model hold equal values in the file; only ``elements`` are compared."""
    stored = [name for name in names if name in checkpoint.tensors]
    if len({checkpoint.spec(name) for name in stored}) < 2:
        return
    contents: list[bytearray] = []
    for name in stored:
        contents.append(bytearray(len(elements) * ITEM_SIZE[checkpoint.spec(name).dtype]))
        checkpoint.read_into(name, elements.start, memoryview(contents[-1]))
    if any(content != contents[0] for content in contents):
        raise InputError(
            f"is tied to {stored[0]} in the task's model, but the file holds other values",
            path=checkpoint.path,
            tensor=stored[-1],
        )


def read(spec: StoredTensor, name: str, read_into: ReadInto, out: Tensor, first: int = 0) -> None:
    """Read the elements of a tensor from index ``first`` into ``out`` (any shape, device and dtype, contiguous).

    Data pass through one small buffer, or directly into ``out`` if it is on the host and has the file's dtype.
    """
    flat = out.view(-1)
    count, item, dtype = flat.numel(), ITEM_SIZE[spec.dtype], TORCH[spec.dtype]
    if not count:
        return
    if flat.device.type == "cpu" and flat.dtype == dtype:
        read_into(name, first, memory_of(flat))
        return
    buffer = bytearray(min(count * item, _CHUNK))
    for start in range(0, count, _CHUNK // item):
        length = min(_CHUNK // item, count - start)
        read_into(name, first + start, memoryview(buffer)[: length * item])
        flat[start : start + length] = torch.frombuffer(buffer, dtype=dtype, count=length)


def memory_of(tensor: Tensor) -> memoryview:
    """Return a writable view of the bytes of a contiguous host tensor; valid as long as the tensor is alive."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
