"""The batches of a task as a search needs them: moved, counted, in the order of a seed, without end where asked."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from ckptavg.batches.cache import BatchCache
from ckptavg.batches.stream import END, BatchStream, LocalShard, share
from ckptavg.cost import CostMeter
from ckptavg.errors import CkptavgError, TaskError, is_out_of_memory
from ckptavg.runtime import signals
from ckptavg.runtime.seeds import reseed
from ckptavg.runtime.workers import ALONE, Workers
from ckptavg.score import Split
from ckptavg.tasks import Task
from ckptavg.tasks import batch as batches
from ckptavg.tasks.failure import task_error
from ckptavg.tasks.holdout import HeldOut


class RankBatch(NamedTuple):
    """A batch of a pass that workers divide among them; one that is not ``counted`` is another's, for company.

    ``mark`` is a checksum of its examples.
    """

    batch: Any
    size: int
    checksum: int
    counted: bool


class BatchLoader:
    """What a task's loaders give, on the device.

    The splits ``fit`` and ``held`` are the two halves of what is scored on. Global generators are seeded before each
    batch is fetched, so loaders that shuffle by them repeat themselves, and again after it: what a loss draws for one
    batch depends neither on those before it, which an interrupted run may have done already, nor on whether it was
    read or, as passes over little data are, kept.

    Args:
        task: whose loaders.
        scored_on: the split that is halved.
        device: where batches go.
        seed: of the passes and of the halves.
        meter: is told each batch that goes forward.
        workers: who divide batches, or a pass, among them.
    """

    def __init__(
        self, task: Task, scored_on: Split, device: torch.device, seed: int, meter: CostMeter, workers: Workers = ALONE
    ) -> None:
        self._task = task
        self._device = device
        self._seed = seed
        self._meter = meter
        self._workers = workers
        self._halves = HeldOut(task, scored_on, rest="fit", to="held", fraction=0.5, seed=seed)
        self._lengths: dict[Split, int] = {}
        self._streams: dict[Split, BatchStream] = {}
        self._kept = BatchCache(device)
        self.examples: dict[Split, int] = {}  # of the last whole pass
        self.order: dict[Split, int] = {}  # a checksum of the examples of the last pass so far, as they came
        self.needs_two = False  # whether a batch of one example cannot be used, having no statistics

    def restart(self, *, halved: bool = False) -> None:
        """Begin all streams anew; ``halved`` batches are more than they were."""
        self._streams = {}
        if halved:
            self._lengths = {}
            self._kept.forget()

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

    def stream(self, split: Split, divided: Callable[[], bool] = lambda: False) -> BatchStream:
        """The batches to learn from, pass after pass; of ``divided`` ones this worker's part of the examples.

        There is always something to take: who has no part of a small batch gets an example of weight 0.
        """
        if split not in self._streams:

            def start(first: int) -> Iterator[Any]:
                divided()  # which may look at data, and draw random numbers
                return self._endless(split, first)

            def take(batch: Any, number: int) -> LocalShard:
                with self._translate_errors(split, lambda: number % self.length(split) + 1):
                    return self._taken(batch, divided=divided())

            self._streams[split] = BatchStream(start, take, self._seed)
        return self._streams[split]

    def first(self, split: Split) -> Iterator[Any]:
        """The beginning of the pass that a stream begins with, to look at; not counted and not moved."""
        yield from itertools.islice(_seeded(self._learnable(split), self._seed), 1)

    def scored(self, split: Split, workers: Workers = ALONE) -> Iterator[RankBatch]:
        """One pass over all examples, of which each worker has every ``world``-th batch and as many turns as others."""
        for batch, sizes, mark in self._passed(split, workers, learnable=False):
            yield RankBatch(batch, batches.size(batch), mark, workers.rank < len(sizes))

    def learnable(self, split: Split, workers: Workers = ALONE) -> Iterator[Any]:
        """One pass over a split for statistics, of which each worker has every ``world``-th batch."""
        for batch, sizes, _ in self._passed(split, workers, learnable=True):
            if workers.rank < len(sizes):
                yield batch

    def empty(self, split: Split) -> TaskError:
        """What to say of a split without batches."""
        if split in ("fit", "held") or (isinstance(self._task, HeldOut) and split in ("val", "test")):
            what = f"the {split} part of the divided data is empty"
            return TaskError(what, path=self._task.source, hint="give it more data")
        return TaskError(f"{split}_dataloader() gave no batches", path=self._task.source)

    def _data(self, split: Split) -> Task:
        return self._halves if split in ("fit", "held") else self._task

    def _passed(self, split: Split, workers: Workers, *, learnable: bool) -> Iterator[tuple[Any, Sequence[int], int]]:
        """A worker's batch of each turn of a pass, or the last one, the sizes of all of the turn, and its checksum."""
        reseed(self._seed, 0)
        seen = self.order[split] = 0
        found = (self._own if workers.world_size == 1 else self._divided)(split, workers, learnable)
        for number, (batch, sizes, mark) in enumerate(self._with_translated_errors(split, found)):
            for size in sizes:
                seen += size
                self._meter.count("forward", size)
            self.order[split] = zlib.crc32(mark.to_bytes(4), self.order[split])
            # what a loss draws depends neither on who has the batch nor on what was fetched with it, or kept
            reseed(self._seed, number * workers.world_size + workers.rank + 1)
            yield batch, sizes, mark
        self.examples[split] = seen

    def _taken(self, batch: Any, *, divided: bool) -> LocalShard:
        size, weight = batches.size(batch), 1.0
        if divided:
            batch, weight = share(batch, self._workers.rank, self._workers.world_size)
        return LocalShard(batches.to_device(batch, self._device), size, weight)

    def _learnable(self, split: Split) -> Iterator[Any]:
        return (b for b in self._data(split).batches(split) if not self._too_small(split, batches.size(b)))

    def _too_small(self, split: Split, size: int) -> bool:
        """What is left of a divided batch may be one example."""
        data = self._data(split)
        return size == 1 and self.needs_two and isinstance(data, HeldOut) and data.divides(split)

    def _endless(self, split: Split, first: int) -> Iterator[Any]:
        """From batch number ``first`` on; whole passes before it are not read where their length is known."""
        length = self._data(split).length(split)
        skipped = first // length if length else 0
        return itertools.islice(self._passes(split, skipped), first - skipped * (length or 0), None)

    def _passes(self, split: Split, first: int) -> Iterator[Any]:
        for number in itertools.count(first):
            batch = None
            for batch in self._with_translated_errors(split, _seeded(self._learnable(split), self._seed + number)):
                yield batch
            if batch is None:
                raise self.empty(split)

    def _own(self, split: Split, workers: Workers, learnable: bool) -> Iterator[tuple[Any, Sequence[int], int]]:
        kept = self._kept.passed(split, partial(self._data(split).batches, split))
        for batch, size, sample in _seeded(kept, self._seed):
            if not (learnable and self._too_small(split, size)):
                yield batch, [size], zlib.crc32(sample)

    def _divided(self, split: Split, workers: Workers, learnable: bool) -> Iterator[tuple[Any, Sequence[int], int]]:
        """A task with ``turns(split, rank, world)`` reads a worker's own batches alone; of any other it reads all."""
        own = getattr(self._data(split), "turns", None)
        turns = own and own(split, workers.rank, workers.world_size)
        source = self._learnable(split) if learnable else self._data(split).batches(split)
        found = (
            _seeded(turns, self._seed, workers.world_size)
            if turns
            else _rank_batches(_seeded(source, self._seed), workers)
        )
        for batch, sizes in found:
            yield batches.to_device(batch, self._device), sizes, zlib.crc32(batches.sample(batch))

    def _with_translated_errors(self, split: Split, source: Iterator[Any]) -> Iterator[Any]:
        """What ``source`` gives; a batch may be an object of any class, whose methods may do anything."""
        for number in itertools.count(1):
            with self._translate_errors(split, lambda number=number: number):
                batch = next(source, END)
            if batch is END:
                return
            yield batch

    @contextmanager
    def _translate_errors(self, split: Split, number: Callable[[], int]) -> Generator[None]:
        try:
            yield
        except CkptavgError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise task_error(self._task.source, f"{split}_dataloader", f"batch {number()}", error) from error


def _seeded(source: Iterator[Any], seed: int, world: int = 1) -> Iterator[Any]:
    """What ``source`` gives, each of it or each turn of several workers by random numbers of its own, equal for all."""
    for number in itertools.count():
        signals.check()
        reseed(seed, number * world)
        batch = next(source, END)
        if batch is END:
            return
        yield batch


def _rank_batches(source: Iterator[Any], workers: Workers) -> Iterator[tuple[Any, Sequence[int]]]:
    while turn := list(itertools.islice(source, workers.world_size)):
        yield turn[min(workers.rank, len(turn) - 1)], [batches.size(batch) for batch in turn]
