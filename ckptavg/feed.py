"""The batches of a task as a search needs them: moved, counted, in the order of a seed, without end where asked."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ckptavg import batches
from ckptavg.determinism import seed_all
from ckptavg.errors import TaskError
from ckptavg.meter import Meter
from ckptavg.objective import Split
from ckptavg.tasks import Task
from ckptavg.tasks.held_out import HeldOut
from ckptavg.workers import ALONE, Workers


class Share(NamedTuple):
    """What one worker takes of a batch of ``size`` examples, and the weight of that; weights sum over workers."""

    batch: Any
    size: int
    weight: float


class Turn(NamedTuple):
    """A batch of a pass that workers divide among them; one that is not ``counted`` is another's, for company.

    ``mark`` is a checksum of its examples.
    """

    batch: Any
    size: int
    mark: int
    counted: bool


class Feed:
    """What a task's loaders give, on the device.

    The splits ``fit`` and ``held`` are the two halves of what is scored on. A pass begins with global generators
    seeded, so loaders that shuffle by them repeat themselves.

    Args:
        task: whose loaders.
        scored_on: the split that is halved.
        device: where batches go.
        seed: of the passes and of the halves.
        meter: is told each batch that goes forward.
        workers: who divide batches, or a pass, among them.
    """

    def __init__(
        self, task: Task, scored_on: Split, device: torch.device, seed: int, meter: Meter, workers: Workers = ALONE
    ) -> None:
        self._task = task
        self._device = device
        self._seed = seed
        self._meter = meter
        self._workers = workers
        self._halves = HeldOut(task, scored_on, rest="fit", to="held", fraction=0.5, seed=seed)
        self._lengths: dict[Split, int] = {}
        self._streams: dict[Split, Iterator[Any]] = {}
        self.examples: dict[Split, int] = {}  # of the last whole pass
        self.needs_two = False  # whether a batch of one example cannot be used, having no statistics

    def restart(self, *, halved: bool = False) -> None:
        """Begin all streams anew; ``halved`` batches are more than they were."""
        self._streams = {}
        if halved:
            self._lengths = {}

    def length(self, split: Split) -> int:
        """How many batches a pass has; read once and counted where the loader does not know.

        Raises:
            TaskError: if there are none.
        """
        if split not in self._lengths:
            known = self._data(split).length(split)
            self._lengths[split] = sum(1 for _ in self._learnable(split)) if known is None else known
        if not self._lengths[split]:
            raise self.empty(split)
        return self._lengths[split]

    def first(self, split: Split) -> Iterator[Any]:
        """The beginning of the pass that `next` begins with, to look at; not counted and not moved."""
        seed_all(self._seed)
        yield from itertools.islice(self._learnable(split), 1)

    def next(self, split: Split, *, divided: bool = False) -> Share:
        """The next batch to learn from, pass after pass; of a ``divided`` one this worker's part of the examples.

        There is always something to take: who has no part of a small batch gets an example of weight 0.
        """
        if split not in self._streams:
            self._streams[split] = self._endless(split)
        batch = next(self._streams[split])
        size = batches.size(batch)
        if not divided:
            return Share(batches.to_device(batch, self._device), size, 1.0)
        part, weight = share(batch, self._workers.rank, self._workers.world)
        return Share(batches.to_device(part, self._device), size, weight)

    def scored(self, split: Split, workers: Workers = ALONE) -> Iterator[Turn]:
        """One pass over all examples, of which each worker has every ``world``-th batch and as many turns as others."""
        for batch, sizes in self._passed(split, workers, lambda: self._data(split).batches(split)):
            mark = zlib.crc32(batches.sample(batch))
            counted = workers.rank < len(sizes)
            yield Turn(batches.to_device(batch, self._device), batches.size(batch), mark, counted)

    def learnable(self, split: Split, workers: Workers = ALONE) -> Iterator[Any]:
        """One pass over a split for statistics, of which each worker has every ``world``-th batch."""
        for batch, sizes in self._passed(split, workers, lambda: self._learnable(split)):
            if workers.rank < len(sizes):
                yield batches.to_device(batch, self._device)

    def empty(self, split: Split) -> TaskError:
        """What to say of a split without batches."""
        if split in ("fit", "held") or (isinstance(self._task, HeldOut) and split in ("val", "test")):
            what = f"the {split} part of the divided data is empty"
            return TaskError(what, path=self._task.source, hint="give it more data")
        return TaskError(f"{split}_dataloader() gave no batches", path=self._task.source)

    def _data(self, split: Split) -> Task:
        return self._halves if split in ("fit", "held") else self._task

    def _passed(
        self, split: Split, workers: Workers, source: Callable[[], Iterator[Any]]
    ) -> Iterator[tuple[Any, Sequence[int]]]:
        """A worker's batch of each turn of a pass, or the last one, and the sizes of all of the turn; all are counted.

        A task with ``turns(split, rank, world)`` reads a worker's own alone; of any other one it reads all.
        """
        seed_all(self._seed)
        own = getattr(self._data(split), "turns", None) if workers.world > 1 else None
        turns = own and own(split, workers.rank, workers.world)
        seen = 0
        for batch, sizes in turns or _turns(source(), workers):
            for size in sizes:
                seen += size
                self._meter.count("forward", size)
            yield batch, sizes
        self.examples[split] = seen

    def _learnable(self, split: Split) -> Iterator[Any]:
        """What is left of a divided batch may be one example."""
        data = self._data(split)
        divided = isinstance(data, HeldOut)
        return (b for b in data.batches(split) if not (divided and self.needs_two and batches.size(b) == 1))

    def _endless(self, split: Split) -> Iterator[Any]:
        for pass_number in itertools.count():
            seed_all(self._seed + pass_number)
            batch = None
            for batch in self._learnable(split):
                yield batch
            if batch is None:
                raise self.empty(split)


def _turns(source: Iterator[Any], workers: Workers) -> Iterator[tuple[Any, Sequence[int]]]:
    source = iter(source)
    while turn := list(itertools.islice(source, workers.world)):
        yield turn[min(workers.rank, len(turn) - 1)], [batches.size(batch) for batch in turn]


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
