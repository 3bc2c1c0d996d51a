"""Read a sparse tensor as the dense one that it stands for, some elements at a time.

Shape suffixes: S = sparse dimensions, R = runs of stored elements, B = bytes of a run.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from ckptavg.readers import ITEM_SIZE, StoredTensor
from ckptavg.readers.pickle.torch_objects import DTYPES

Runs: TypeAlias = tuple[Any, Any]  # [R], positions in C order, in runs, ascending; [R, B], the bytes
_TORCH: Final = {dtype: name.removeprefix("torch.") for name, dtype in DTYPES.items()}


def stored_runs(tensor: StoredTensor, read_into: Callable[[StoredTensor, int, memoryview], None]) -> Runs:
    """Return the stored elements of a sparse tensor of any layout, those at the same position summed.

    Raises:
        ValueError: if its indices are not those of a tensor of this shape.
    """
    import torch

    def read(part: StoredTensor) -> Any:
        content, dtype = bytearray(part.nbytes), getattr(torch, _TORCH[part.dtype])
        read_into(part, 0, memoryview(content))
        return (torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)).view(part.shape)

    assert tensor.sparse is not None
    layout, shape = tensor.sparse.layout, tensor.shape[: len(tensor.shape) - tensor.is_complex]
    indices, values = [read(part) for part in tensor.sparse.indices], read(tensor.sparse.values)
    make: Any = torch.sparse_coo_tensor
    try:
        indices_SR = indices[0]
        if layout != "torch.sparse_coo":
            indices_SR, values = _coordinates(layout, indices, values)
        coo = make(indices_SR, values, shape, check_invariants=True).coalesce()
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(str(error).partition("\n")[0]) from error
    values = coo.values().contiguous()
    positions_R = torch.zeros(len(values), dtype=torch.int64)
    for size, index_R in zip(shape, coo.indices(), strict=False):
        positions_R = positions_R * size + index_R
    size = max(1, math.prod(values.shape[1:])) * values.itemsize
    return positions_R, values.view(-1).view(torch.uint8).view(-1, size)


def _coordinates(layout: str, indices: Sequence[Any], values: Any) -> tuple[Any, Any]:
    """Return the row and column of each element of a compressed layout, and the elements, of blocks one by one."""
    import torch

    pointers, minor = indices
    if pointers.ndim != 1 or minor.shape != values.shape[:1]:
        raise ValueError("it is batched, or has an index too many or too few")
    major = torch.repeat_interleave(torch.arange(len(pointers) - 1), pointers.long().diff())
    minor = minor.long()
    if layout in ("torch.sparse_bsr", "torch.sparse_bsc"):
        height, width = block = values.shape[1:3]
        row, column = (major, minor) if layout == "torch.sparse_bsr" else (minor, major)
        row = row.view(-1, 1, 1) * height + torch.arange(height).view(1, -1, 1)
        column = column.view(-1, 1, 1) * width + torch.arange(width)
        row, column = (index.expand(-1, *block).flatten() for index in (row, column))
        return torch.stack([row, column]), values.flatten(0, 2)
    return torch.stack([major, minor] if layout == "torch.sparse_csr" else [minor, major]), values


def expand(tensor: StoredTensor, runs: Runs, start: int, out: memoryview) -> None:
    """Fill ``out`` as `ckptavg.readers.Reader.read_into` does, from the result of `stored_runs`."""
    import torch

    positions_R, bytes_RB = runs
    size, begin = bytes_RB.shape[1], start * ITEM_SIZE[tensor.dtype]
    first, last = begin // size, -(-(begin + len(out)) // size)
    lines = torch.zeros(last - first, size, dtype=torch.uint8)
    low, high = torch.searchsorted(positions_R, torch.tensor([first, last])).tolist()
    lines[positions_R[low:high] - first] = bytes_RB[low:high]
    out[:] = lines.view(-1)[begin - first * size :][: len(out)].numpy().data
