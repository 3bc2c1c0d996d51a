"""Rectangular parts of a tensor: positions of a part's elements in the C order of the whole tensor.

Both are in C order, so any range of the whole intersects a box in one range of the box's own elements.
"""

import math
from collections.abc import Iterator, Sequence


class Box:
    """Elements ``offsets`` to ``offsets + sizes`` of a tensor of ``shape``."""

    __slots__ = ("_inner", "first", "last", "numel", "offsets", "run", "shape", "sizes")

    def __init__(self, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        self.shape = shape
        self.offsets = offsets
        self.sizes = sizes
        self.numel = math.prod(sizes)
        # indices of its first and, unless the box is empty, its last element in the whole tensor
        self.first = _ravel(offsets, shape)
        self.last = _ravel([at + size - 1 for at, size in zip(offsets, sizes, strict=True)], shape)
        # the last dimension that it covers in part; its elements are contiguous from there on
        self._inner = next((d for d in reversed(range(len(shape))) if sizes[d] != shape[d]), 0)
        self.run = math.prod(sizes[self._inner :])  # number of elements that are contiguous in the whole tensor

    def as_real(self) -> "Box":
        """Return the box of a complex tensor in that tensor as a real one; see `ckptavg.readers.as_real`."""
        return Box((*self.shape, 2), (*self.offsets, 0), (*self.sizes, 2))

    def before(self, index: int) -> int:
        """Return the number of its elements before element ``index`` of the whole tensor."""
        if index >= math.prod(self.shape):
            return self.numel
        count, rest = 0, self.numel
        for at, offset, size in zip(_unravel(index, self.shape), self.offsets, self.sizes, strict=True):
            if at < offset:
                return count
            if at >= offset + size:
                return count + rest
            rest //= size
            count += (at - offset) * rest
        return count

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield its elements from ``start`` to ``stop``, in order, as runs that are contiguous in the whole tensor too.

        Each is (first index in the whole tensor, first index in the box, number of elements). A generator, because a
        box of one column has as many runs as rows.
        """
        inner, length = self._inner, self.run
        while start < stop:
            row, skip = divmod(start, length)
            outer = [at + o for at, o in zip(_unravel(row, self.sizes[:inner]), self.offsets[:inner], strict=True)]
            at = _ravel([*outer, *self.offsets[inner:]], self.shape)
            count = min(length - skip, stop - start)
            yield at + skip, start, count
            start += count


def untiled(boxes: Sequence[Box], shape: tuple[int, ...]) -> str | None:
    """Return why ``boxes`` do not tile a tensor of ``shape`` (each element in exactly one box), or None if they do."""
    for box in boxes:
        if any(at + size > n for at, size, n in zip(box.offsets, box.sizes, shape, strict=True)):
            return f"its part {list(box.sizes)} at {list(box.offsets)} exceeds its shape {list(shape)}"
    numel, parts = math.prod(shape), sum(box.numel for box in boxes)
    if numel != parts:
        return f"its parts have {parts} elements, but its shape {list(shape)} has {numel}"
    full = [box for box in boxes if box.numel]
    # boxes inside the shape, of the same volume in total and disjoint, cover every element
    d = max(range(len(shape)), key=lambda d: len({box.offsets[d] for box in full}), default=0)
    open_boxes: list[Box] = []
    for box in sorted(full, key=lambda box: box.offsets[d]) if shape else ():
        open_boxes = [other for other in open_boxes if other.offsets[d] + other.sizes[d] > box.offsets[d]]
        for other in open_boxes:
            sides = zip(box.offsets, box.sizes, other.offsets, other.sizes, strict=True)
            if all(at < other_at + n and other_at < at + size for at, size, other_at, n in sides):
                return f"its parts at {list(other.offsets)} and {list(box.offsets)} overlap"
        open_boxes.append(box)
    return None


def _ravel(position: Sequence[int], shape: Sequence[int]) -> int:
    index = 0
    for at, n in zip(position, shape, strict=True):
        index = index * n + at
    return index


def _unravel(index: int, shape: Sequence[int]) -> list[int]:
    position: list[int] = []
    for n in reversed(shape):
        index, at = divmod(index, n)
        position.append(at)
    return position[::-1]
