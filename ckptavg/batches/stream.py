"""An endless stream of batches to learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch

from ckptavg.runtime.seeds import reseed
from ckptavg.tasks import batch as batches

END: Final = object()


class LocalShard(NamedTuple):
    """What one worker takes of a batch of ``size`` examples, and the weight of that; weights sum over workers."""

    batch: Any
    size: int
    weight: float


class BatchStream:
    """Batches one after the other; only what is taken of the last of those that were passed is on the device."""

    def __init__(
        self, start: Callable[[int], Iterator[Any]], take: Callable[[Any, int], LocalShard], seed: int
    ) -> None:
        self._start = start
        self._take = take
        self._seed = seed
        self._source: Iterator[Any] | None = None
        self._at = self._fetched = -1
        self._share: LocalShard | None = None

    def advance(self) -> None:
        """Go on to the next batch; it is fetched when it is asked for."""
        self._at += 1

    @property
    def share(self) -> LocalShard:
        """What this worker takes of the batch that it has come to; what is drawn after that is the same each time."""
        if self._source is None:
            self._source, self._fetched = self._start(self._at), self._at - 1
        batch: Any = END
        while self._fetched < self._at:
            batch = next(self._source)
            self._fetched += 1
        if batch is not END:
            self._share = None  # its memory is there for the next one
            self._share = self._take(batch, self._at)
        assert self._share is not None
        reseed(self._seed, self._at + 1)
        return self._share


def share(batch: Any, rank: int, world: int) -> tuple[Any, float]:
    """The part of a batch that falls to one of ``world`` workers, and which fraction of its examples that is.

    Raises:
        TypeError: if the batch is of a kind that cannot be cut.
    """
    size = batches.size(batch)
    start, stop = size * rank // world, size * (rank + 1) // world
    places = torch.arange(size)
    part = batches.select(batch, (start <= places) & (places < max(stop, start + 1)))
    return part, (stop - start) / size
