"""Gather the elements of a non-contiguous tensor in C order, reading few bytes that are not needed."""

import math
from collections.abc import Callable, Iterator
from typing import Final

from ckptavg.readers import ITEM_SIZE, StoredTensor

_LARGE: Final = 16 << 20  # maximum bytes per read
_SMALL: Final = 64 << 10  # spans of at most this many bytes are read whole
_WASTE: Final = 4  # maximum bytes read per byte used, for spans larger than _SMALL


def gather(tensor: StoredTensor, start: int, out: memoryview, read_into: Callable[[int, memoryview], None]) -> None:
    """Fill ``out``, which is not empty, as `ckptavg.readers.Reader.read_into` does.

    Args:
        tensor: tensor of rank ≥ 1 with strides and without overlapping elements.
        read_into: ``(offset, buffer)`` fills a buffer with the record's bytes from an offset on.
    """
    import torch

    size = ITEM_SIZE[tensor.dtype]
    stride = tensor.stride or ()
    # elements as integers (as complex128 for 16 bytes): values are copied, never interpreted
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[size]

    def fill(target: torch.Tensor, first: int) -> None:
        shape = tuple(target.shape)
        span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if span * size <= _LARGE and (span * size <= _SMALL or span <= _WASTE * target.numel()):
            content = bytearray(span * size)
            read_into(tensor.offset + first * size, memoryview(content))
            target.copy_(torch.frombuffer(content, dtype=kind).as_strided(shape, stride))
            return
        widest = max(range(len(shape)), key=lambda i: (shape[i] - 1) * stride[i])
        half = shape[widest] // 2
        fill(target.narrow(widest, 0, half), first)
        fill(target.narrow(widest, half, shape[widest] - half), first + half * stride[widest])

    flat = torch.frombuffer(out, dtype=kind)
    for corner, shape in boxes(tensor.shape, start, start + flat.numel()):
        count = math.prod(shape)
        fill(flat[:count].view(shape), sum(i * step for i, step in zip(corner, stride, strict=True)))
        flat = flat[count:]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield elements ``start`` to ``stop`` of an array of rank ≥ 1 as boxes in C order: (first index, shape)."""
    rows = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    while start < stop:
        corner = tuple(start // row % n for row, n in zip(rows, shape, strict=True))
        d = next(d for d, row in enumerate(rows) if start % row == 0 and start + row <= stop)
        count = min(shape[d] - corner[d], (stop - start) // rows[d])
        yield corner, (*(1,) * d, count, *shape[d + 1 :])
        start += count * rows[d]
