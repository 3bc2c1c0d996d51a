"""Cache of batches on the device: the first pass over a split reads its data, later passes reuse the batches."""

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ckptavg.score import Split
from ckptavg.tasks import batch as batches
from ckptavg.tasks.batch import Batch

HOST: Final = 256 << 20  # bytes of the cache, over all splits, in host memory
_SHARE: Final = 16  # the cache takes 1/16 of a GPU's free memory


class CachedBatch(NamedTuple):
    """A batch on the device, its number of examples, and its `ckptavg.tasks.batch.checksum` as read."""

    batch: Any
    size: int
    checksum: int


class BatchCache:
    """Complete passes over a task's splits, as long as they fit in a small budget.

    Copies are stored, because a loader may reuse its memory; and copies of those are yielded, so that a loss may change
    its batch in place, as it may with a loader's batch. Checksums are of the ``content`` of a batch.
    """

    def __init__(self, device: torch.device, content: Callable[[Any], Any] = lambda batch: batch) -> None:
        self._device = device
        self._content = content
        self._room = torch.cuda.mem_get_info(device)[0] // _SHARE if device.type == "cuda" else HOST
        self._passes: dict[Split, list[CachedBatch]] = {}
        self._refused: set[Split] = set()

    def passed(self, split: Split, source: Callable[[], Iterator[Batch]]) -> Iterator[CachedBatch]:
        """Yield the batches of one pass over ``split``, read from ``source`` only if they are not cached."""
        if split in self._passes:
            for entry in self._passes[split]:
                yield entry._replace(batch=batches.copied(entry.batch, self._device))
            return
        entries: list[CachedBatch] = []
        try:
            for batch, size in source():
                checksum = batches.checksum(self._content(batch), size)
                if split not in self._refused:
                    if self._fits(batch):
                        self._room -= _bytes(batch)
                        entries.append(CachedBatch(batches.copied(batch, self._device), size, checksum))
                    else:
                        self._refused.add(split)
                        self._free(entries)
                yield CachedBatch(batches.to_device(batch, self._device), size, checksum)
            if split not in self._refused:
                self._passes[split], entries = entries, []
        finally:
            self._free(entries)  # of an unfinished pass

    def _fits(self, batch: Any) -> bool:
        return all(map(_plain, batches.leaves(batch, movable=True))) and _bytes(batch) <= self._room

    def _free(self, entries: list[CachedBatch]) -> None:
        self._room += sum(_bytes(entry.batch) for entry in entries)
        entries.clear()


def _plain(leaf: Any) -> bool:
    """Return whether a copy of ``leaf`` can replace the one that another pass would read."""
    if isinstance(leaf, Tensor):
        return type(leaf) is Tensor and leaf.layout == torch.strided and not leaf.requires_grad
    if isinstance(leaf, list | tuple):
        return not hasattr(leaf, "to") and all(map(_plain, leaf))
    return leaf is None or isinstance(leaf, str | bytes | int | float)


def _bytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in batches.leaves(batch) if isinstance(leaf, Tensor))
