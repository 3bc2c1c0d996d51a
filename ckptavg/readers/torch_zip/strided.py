"""Elements of a tensor that do not lie one behind the other, gathered in C order from as few bytes as is sensible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from ckptavg.readers import ITEM_SIZE, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_LARGE: Final = 16 << 20  # bytes read at once, at most …
_SMALL: Final = 64 << 10  # … and at least, unless fewer hold everything
_WASTE: Final = 4  # bytes read for each byte that is used, in what is larger than _SMALL


def gather(tensor: StoredTensor, start: int, out: memoryview, read_into: Callable[[int, memoryview], None]) -> None:
    """Fill ``out`` with the elements of ``tensor`` from number ``start`` on, counted in C order.

    Args:
        tensor: of rank ≥ 1, with strides, no two elements overlapping.
        start: the first element.
        out: contiguous bytes, a multiple of the element size, within the tensor; not empty.
        read_into: fills a buffer with the record's bytes from an offset on.
    """
    import torch

    size = ITEM_SIZE[tensor.dtype]
    stride = tensor.stride or ()
    # elements as integers (pairs of them for 16 bytes): no value is ever looked at
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[size]

    def fill(target: Tensor, first: int) -> None:
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
    """The elements ``start`` < ``stop`` of an array of rank ≥ 1 as boxes in C order: (first index, shape)."""
    row = math.prod(shape[1:])
    first, skipped = divmod(start, row)
    last, rest = divmod(stop, row)
    if first == last:
        for corner, inner in boxes(shape[1:], skipped, rest):
            yield (first, *corner), (1, *inner)
        return
    if skipped:
        for corner, inner in boxes(shape[1:], skipped, row):
            yield (first, *corner), (1, *inner)
        first += 1
    if first < last:
        yield (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])
    if rest:
        for corner, inner in boxes(shape[1:], 0, rest):
            yield (last, *corner), (1, *inner)
