"""Read a model's state from a checkpoint into flat vectors.

Shape suffixes: D = elements of one dtype, C = some of them, consecutive.
"""

import ctypes
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Final

import torch
from torch import Tensor

from ckptavg.candidates.flat import Flat, Slot, as_real, overlapping
from ckptavg.candidates.products import INLINE
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.integrity import is_shared, not_finite, refusal
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.errors import InputError, TaskError
from ckptavg.readers import FLOATING, ITEM_SIZE, StoredTensor
from ckptavg.runtime.threads import processors

READERS: Final = 4  # rows read in parallel; more do not increase disk or memory throughput
_CHUNK: Final = 1 << 20  # bytes per read of values to convert
Specs = Mapping[str, StoredTensor]
ReadInto = Callable[[str, int, memoryview], None]


class SharedError(Exception):
    """Raised for tensors that are not finite, but equal in all candidates: they must be copied, not mixed."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(*names)
        self.names = names


def read_rows(candidates: Sequence[Checkpoint], flat: Flat, out_ND: Sequence[Tensor]) -> Generator[None]:
    """Read all checkpoints into rows in the CPU's memory, in parallel; yields as often as one more is there, in order.

    Threads read the files straight into the rows, or convert their dtype on the way.

    Raises:
        SharedError, InputError: as `read_row`, for the first checkpoint that has an error.
    """
    pool = ThreadPoolExecutor(min(READERS, processors()), "reading", initializer=_start, initargs=(Lock(),))
    try:
        rows = zip(candidates, out_ND, strict=True)
        for done in [pool.submit(read_row, checkpoint, flat, candidates, row_D) for checkpoint, row_D in rows]:
            done.result()
            yield
    finally:
        pool.shutdown(cancel_futures=True)


def _start(turn: Lock) -> None:
    """Let torch set itself up in this thread; in a forked process it fails if two threads do so at once."""
    with turn:
        torch.get_num_threads()


def read_row(checkpoint: Checkpoint, flat: Flat, candidates: Sequence[Checkpoint], row_D: Tensor) -> Tensor:
    """Read a checkpoint's values of one dtype into ``row_D``, [D], and return it.

    Raises:
        SharedError: if tensors are not finite that can be copied; a sharded parameter cannot.
        InputError: if other values are not finite, and that is not allowed.
    """
    for slot in flat.slots:
        check_tied(checkpoint, slot)
    read_columns(flat.slots, checkpoint.tensors, checkpoint.read_into, 0, row_D)
    parts = row_D.split(INLINE) if row_D.device.type == "cpu" else (row_D,)
    if len(row_D) and not all(map(_is_finite, parts)):
        slots = (slot for slot in flat.slots if slot.numel and not _is_finite(row_D[slot.start :][: slot.numel]))
        bad = [present(slot.names, checkpoint.tensors) for slot in slots]
        shared = [] if flat.shards else [n for n in bad if not_finite(checkpoint, n) and is_shared(candidates, n)]
        if shared:
            raise SharedError(shared)
        if not checkpoint.allow_nonfinite:
            message = f"its values overflow {str(row_D.dtype).removeprefix('torch.')}, its dtype in the task's model"
            overflow = InputError(message, path=checkpoint.path, tensor=bad[0])
            raise refusal([checkpoint], candidates, bad[0]) or overflow
    return row_D


def read_columns(slots: Sequence[Slot], specs: Specs, read_into: ReadInto, start: int, out_C: Tensor) -> None:
    """Read the elements of a flat vector from ``start`` on into ``out_C``, of any device and dtype."""
    for k, begin, end in overlapping(slots, start, start + len(out_C)):
        first = slots[k].first + begin - slots[k].start
        read(slots[k].names, specs, read_into, out_C[begin - start : end - start], first)


def read(names: tuple[str, ...], specs: Specs, read_into: ReadInto, out: Tensor, first: int = 0) -> None:
    """Read the elements of a tensor from index ``first`` into ``out`` (any shape, device and dtype, contiguous).

    Data pass through one small buffer, or directly into ``out`` if it is on the host and has the file's dtype.
    """
    name, flat = present(names, specs), as_real(out).view(-1)
    count, item, dtype = flat.numel(), ITEM_SIZE[specs[name].dtype], TORCH[specs[name].dtype]
    if not count:
        return
    on_cpu = flat.device.type == "cpu"
    if on_cpu and flat.dtype == dtype:  # the view is valid as long as ``out`` is alive
        read_into(name, first, memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())).cast("B"))
        return
    buffer = bytearray(min(count * item, _CHUNK))
    for start in range(0, count, _CHUNK // item):
        length = min(_CHUNK // item, count - start)
        read_into(name, first + start, memoryview(buffer)[: length * item])
        values, step = torch.frombuffer(buffer, dtype=dtype, count=length), INLINE if on_cpu else length
        for source, target in zip(values.split(step), flat[start : start + length].split(step), strict=True):
            target.copy_(source)


def read_like(names: tuple[str, ...], specs: Specs, read_into: ReadInto, tensor: Tensor) -> Tensor:
    """Read a whole tensor with the shape, device, dtype and layout of ``tensor``."""
    values = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    read(names, specs, read_into, values)
    if tensor.layout == torch.sparse_coo:
        return values.to_sparse(tensor.sparse_dim())
    if tensor.layout != torch.strided:
        blocks = tensor.layout in (torch.sparse_bsr, torch.sparse_bsc)
        return values.to_sparse(layout=tensor.layout, blocksize=tensor.values().shape[1:3] if blocks else None)
    return values


def check_names(unique: list[tuple[tuple[str, ...], Tensor]], specs: Specs) -> None:
    """Check that the model's names, shapes and kinds of dtype (floating point or not) match the checkpoints'."""
    extra = sorted(specs.keys() - {name for names, _ in unique for name in names})
    # a sparse tensor of the model may have been too large for the output
    dense = [names for names, tensor in unique if tensor.layout == torch.strided]
    missing = [names[0] for names in dense if specs.keys().isdisjoint(names)]
    if extra or missing:
        lists = [
            f"{label} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for label, names in (("it lacks", extra), ("only it has", missing))
            if names
        ]
        hint = "the model must be the module whose state_dict() was saved; --key chooses a part of a checkpoint"
        prefix = next((name.removesuffix(missing[0]) for name in extra if missing and name.endswith(missing[0])), "")
        if prefix and {f"{prefix}{name}" for name in missing} <= set(extra):
            hint = f"the checkpoints' names begin with {prefix}, as if the model were an attribute of what was saved"
        raise TaskError(f"the model does not fit the checkpoints: {'; '.join(lists)}", hint=hint)
    for names, tensor in unique:
        if specs.keys().isdisjoint(names):
            continue
        name = present(names, specs)
        (dtype, shape), mine = specs[name].in_file, list(tensor.shape)
        stored = list(shape)
        if stored != mine:
            raise TaskError(f"the model has {name} of shape {mine}, the checkpoints {stored}")
        if (dtype in FLOATING, specs[name].is_complex) != (tensor.is_floating_point(), tensor.is_complex()):
            raise TaskError(f"the model has {name} as {tensor.dtype}, the checkpoints as {dtype}")


def present(names: tuple[str, ...], specs: Specs) -> str:
    """Return the first of a tensor's names that is in the file."""
    return next(name for name in names if name in specs)


def check_tied(checkpoint: Checkpoint, slot: Slot) -> None:
    """Check that names tied in the model hold equal values in the file."""
    stored = [name for name in slot.names if name in checkpoint.tensors]
    if len({checkpoint.spec(name) for name in stored}) < 2:
        return
    contents: list[bytearray] = []
    for name in stored:
        contents.append(bytearray(slot.numel * ITEM_SIZE[checkpoint.spec(name).dtype]))
        checkpoint.read_into(name, slot.first, memoryview(contents[-1]))
    if any(content != contents[0] for content in contents):
        message = f"is tied to {stored[0]} in the model, but the file holds other values"
        raise InputError(message, path=checkpoint.path, tensor=stored[-1])


def _is_finite(values: Tensor) -> bool:
    """Return whether all elements of ``values`` (not empty) are finite."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(values))  # 20 × as fast as isfinite().all()
