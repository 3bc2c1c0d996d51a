"""Endless stream of batches for a search."""

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch

from ckptavg.runtime.seeds import reseed
from ckptavg.tasks import batch as batches

END: Final = object()


class LocalShard(NamedTuple):
    """One rank's part of a batch of ``size`` examples, and its weight in the mean over ranks."""

    batch: Any
    size: int
    weight: float


class BatchStream:
    """Batches in order; only this rank's share of the current batch is on the device."""

    def __init__(
        self, start: Callable[[int], Iterator[Any]], take: Callable[[Any, int], LocalShard], seed: int
    ) -> None:
        self._start = start
        self._take = take
        self._seed = seed
        self._source: Iterator[Any] | None = None
        self._position = self._fetched = -1
        self._share: LocalShard | None = None

    def advance(self) -> None:
        """Move to the next batch; it is fetched by `share`."""
        self._position += 1

    def current(self) -> int:
        """Return the number of the current batch: the first one in a stream that was not advanced."""
        self._position = max(self._position, 0)
        return self._position

    @property
    def share(self) -> LocalShard:
        """This rank's share of the current batch; reseeds the generators, so that later draws repeat on each access."""
        self.current()
        if self._source is None:
            self._source, self._fetched = self._start(self._position), self._position - 1
        batch: Any = END
        while self._fetched < self._position:
            batch = next(self._source)
            self._fetched += 1
        if batch is not END:
            self._share = None  # frees its memory for the next batch
            self._share = self._take(batch, self._position)
        assert self._share is not None
        reseed(self._seed, self._position + 1)
        return self._share


def share(batch: Any, size: int, rank: int, world: int) -> tuple[Any, float]:
    """Return one rank's part of a batch divided among ``world`` ranks, and its fraction of the ``size`` examples.

    Raises:
        TypeError: if a batch of this type cannot be divided.
    """
    start, stop = size * rank // world, size * (rank + 1) // world
    places = torch.arange(size)
    part = batches.select(batch, (start <= places) & (places < max(stop, start + 1)))
    return part, (stop - start) / size
