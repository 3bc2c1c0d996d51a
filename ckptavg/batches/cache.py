"""Batches that stay on the device: a pass over a split reads its data once, and every later pass finds them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ckptavg.score import Split
from ckptavg.tasks import batch as batches

HOST: Final = 256 << 20  # bytes of all splits that are kept in the host's memory
_SHARE: Final = 16  # of a GPU's free memory, one part in so many


class CachedBatch(NamedTuple):
    """A batch on the device, the number of its examples, and `ckptavg.tasks.batch.sample` of it as it was read."""

    batch: Any
    size: int
    sample: bytes


class BatchCache:
    """The whole passes of a task's splits, as long as they are small.

    What is kept are copies, because a loader may use its memory again; what is given are copies of them, with which a
    loss may do what it likes, as with what a loader gives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._room = torch.cuda.mem_get_info(device)[0] // _SHARE if device.type == "cuda" else HOST
        self._passes: dict[Split, list[CachedBatch]] = {}
        self._refused: set[Split] = set()

    def forget(self) -> None:
        """The batches are others now."""
        for split in list(self._passes):
            self._refuse(split, [])
        self._refused.clear()

    def passed(self, split: Split, source: Callable[[], Iterator[Any]]) -> Iterator[CachedBatch]:
        """One pass over ``split``, read from ``source`` only where it must be."""
        if split in self._passes:
            for entry in self._passes[split]:
                yield entry._replace(batch=batches.copied(entry.batch, self._device))
            return
        found: list[CachedBatch] = []
        try:
            for batch in source():
                yield self._taken(split, batch, found)
            if split not in self._refused:
                self._passes[split], found = found, []
        finally:
            self._free(found)  # of a pass that was not finished

    def _taken(self, split: Split, batch: Any, found: list[CachedBatch]) -> CachedBatch:
        """The batch on the device; a copy of it is noted among those ``found``, where it may be kept."""
        size, sample = batches.size(batch), batches.sample(batch)
        if split not in self._refused:
            if all(map(_plain, batches.leaves(batch, movable=True))) and (wanted := _bytes(batch)) <= self._room:
                self._room -= wanted
                found.append(CachedBatch(batches.copied(batch, self._device), size, sample))
            else:
                self._refuse(split, found)
        return CachedBatch(batches.to_device(batch, self._device), size, sample)

    def _refuse(self, split: Split, found: list[CachedBatch]) -> None:
        self._free([*found, *self._passes.pop(split, ())])
        found.clear()
        self._refused.add(split)

    def _free(self, entries: Sequence[CachedBatch]) -> None:
        self._room += sum(_bytes(entry.batch) for entry in entries)


def _plain(leaf: Any) -> bool:
    """Whether a copy of ``leaf`` is as good as another pass's own."""
    if isinstance(leaf, Tensor):
        return type(leaf) is Tensor and leaf.layout == torch.strided and not leaf.requires_grad
    if isinstance(leaf, list | tuple):
        return all(map(_plain, leaf))
    return leaf is None or isinstance(leaf, str | bytes | int | float)


def _bytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in batches.leaves(batch) if isinstance(leaf, Tensor))
