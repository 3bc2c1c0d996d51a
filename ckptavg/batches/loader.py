"""Batches of a task for a search: on the device, counted, in a seeded order, and endless if requested."""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from ckptavg.batches.cache import BatchCache
from ckptavg.batches.stream import END, BatchStream, LocalShard, share
from ckptavg.context import Run
from ckptavg.cost import CostMeter
from ckptavg.errors import CkptavgError, TaskError, is_out_of_memory
from ckptavg.runtime import signals
from ckptavg.runtime.seeds import reseed
from ckptavg.runtime.workers import ALONE, Workers
from ckptavg.score import Split
from ckptavg.tasks import Task
from ckptavg.tasks import batch as batches
from ckptavg.tasks.batch import Batch
from ckptavg.tasks.failure import task_error
from ckptavg.tasks.holdout import HeldOut

_T = TypeVar("_T")


class RankBatch(NamedTuple):
    """This rank's batch in a pass divided among ranks, with a checksum of its examples.

    ``counted=False`` marks padding that keeps ranks in step and is left out of the score.
    """

    batch: Any
    size: int
    checksum: int
    counted: bool


def changing_data(split: Split) -> str:
    """Return the remark on a split whose data differ between passes."""
    return (
        f"{split}_dataloader() gives other examples, or another order, in every pass: scores differ by chance too, and "
        "their differences are not paired. Fix its order and its random transforms"
    )


class BatchLoader:
    """Batches of a task's loaders, on the device.

    The splits ``fit`` and ``held`` are the two halves of the scored split. Global generators are reseeded before each
    batch is fetched, so that shuffling loaders repeat, and again after it: random numbers that a loss draws for one
    batch depend neither on earlier batches, which a resumed run skips, nor on whether the batch was read or, as for
    small splits, cached.

    Args:
        scored_on: the split that is halved.
        run: has the device of the batches, the seed, and the ranks that divide a batch of a stream.
        meter: gets the sizes of the batches that the ranks run next.
        needs_two: returns True if a batch of one example is unusable, because BatchNorm needs two.
        on_halving: called when batches are halved because memory ran out.
    """

    def __init__(
        self, task: Task, scored_on: Split, run: Run, meter: CostMeter, *,
        needs_two: Callable[[], bool] = lambda: False, on_halving: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.scored_on: Split = scored_on
        self._task = task
        self._meter = meter
        self._device = run.device
        self._seed = run.seed
        self._workers = run.workers
        self._needs_two = needs_two
        self._on_halving = on_halving
        self._halves = HeldOut(task, scored_on, rest="fit", to="held", fraction=0.5, seed=run.seed)
        self._lengths: dict[Split, int] = {}
        self._streams: dict[Split, BatchStream] = {}
        self._cache = BatchCache(run.device, task.unpadded)
        self.examples: dict[Split, int] = {}  # split → examples of the last whole pass
        self._counted: dict[Split, int] = {}  # split → batches of the last whole pass

    def with_memory(self, work: Callable[[], _T]) -> _T:
        """Run ``work``; if memory runs out, halve the batches and run it again, as long as the task can halve them."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                # with several ranks, one rank cannot halve its batches alone
                if not (is_out_of_memory(error) and self._workers.world_size == 1 and self._task.halve()):
                    raise
            self._on_halving()
            self.restart(halved=True)
            torch.cuda.empty_cache()

    def restart(self, *, halved: bool = False) -> None:
        """Restart all streams; ``halved`` also drops batch counts and cached batches, as the batches have changed."""
        self._streams = {}
        if halved:
            self._lengths, self._counted = {}, {}
            self._cache = BatchCache(self._device, self._task.unpadded)

    def length(self, split: Split) -> int:
        """Return the number of batches in a pass; counted by reading them once if the loader has no length.

        Raises:
            TaskError: if there are no batches.
        """
        if split not in self._lengths:
            length = self._data(split).length(split)
            self._lengths[split] = sum(1 for _ in self._learnable(split)) if length is None else length
        if not self._lengths[split]:
            raise self.empty(split)
        return self._lengths[split]

    def known_length(self, split: Split) -> int | None:
        """Return the number of batches in a pass, or None if that is unknown before the first one."""
        return self._counted.get(split) or self._data(split).length(split)

    def stream(self, split: Split, divides: Callable[[Split], bool] = lambda split: False) -> BatchStream:
        """Return an endless stream over a split; if it ``divides``, of this rank's part of each batch.

        A part is never empty: a rank without examples of a small batch gets one example with weight 0.
        """
        if split not in self._streams:

            def start(first: int) -> Iterator[Batch]:
                divides(split)  # may read data and draw random numbers, so it runs first
                return self._endless(split, first)

            def take(batch: Batch, number: int) -> LocalShard:
                with self._translate_errors(split, lambda: number % self.length(split) + 1):
                    (data, size), weight = batch, 1.0
                    if divides(split):
                        data, weight = share(data, size, self._workers.rank, self._workers.world_size)
                    return LocalShard(batches.to_device(data, self._device), size, weight)

            self._streams[split] = BatchStream(start, take, self._seed)
        return self._streams[split]

    def first(self, split: Split) -> Iterator[Batch]:
        """Yield the first batch of a stream's first pass for inspection; neither counted nor moved to the device."""
        yield from itertools.islice(_seeded(self._learnable(split), self._seed), 1)

    def scored(self, split: Split, workers: Workers = ALONE) -> Iterator[RankBatch]:
        """Yield this rank's batches of one pass: every ``world_size``-th, padded to equally many on all ranks."""
        for batch, sizes, checksum in self._passed(split, workers, learnable=False):
            yield RankBatch(batch, _own(sizes, workers), checksum, workers.rank < len(sizes))

    def learnable(self, split: Split, workers: Workers = ALONE) -> Iterator[Batch]:
        """Yield this rank's batches of one pass for training or BatchNorm statistics: every ``world_size``-th."""
        for batch, sizes, _ in self._passed(split, workers, learnable=True):
            if workers.rank < len(sizes):
                yield Batch(batch, sizes[workers.rank])

    def empty(self, split: Split) -> TaskError:
        """Return the error for a split without batches."""
        if split in ("fit", "held") or (isinstance(self._task, HeldOut) and split in ("val", "test")):
            message = f"the {split} part of the divided data is empty"
            return TaskError(message, path=self._task.source, hint="add more data")
        return TaskError(f"{split}_dataloader() gave no batches", path=self._task.source)

    def _data(self, split: Split) -> Task:
        return self._halves if split in ("fit", "held") else self._task

    def _passed(self, split: Split, workers: Workers, *, learnable: bool) -> Iterator[tuple[Any, Sequence[int], int]]:
        """Yield per step: this rank's batch (or the step's last, as padding), all ranks' batch sizes, a checksum."""
        reseed(self._seed, 0)
        seen = count = 0
        steps = (self._single_rank if workers.world_size == 1 else self._multi_rank)(split, workers, learnable)
        for number, (batch, sizes, checksum) in enumerate(self._with_translated_errors(split, steps)):
            seen, count = seen + sum(sizes), count + len(sizes)
            self._meter.running = sizes
            # random numbers of a loss must not depend on which rank has the batch, prefetching or caching
            reseed(self._seed, number * workers.world_size + workers.rank + 1)
            yield batch, sizes, checksum
        self.examples[split], self._counted[split] = seen, count

    def _learnable(self, split: Split) -> Iterator[Batch]:
        return (b for b in self._data(split).sized_batches(split) if not self._too_small(split, b.size))

    def _too_small(self, split: Split, size: int) -> bool:
        """Return True for a one-example remainder of a divided batch, which BatchNorm cannot use."""
        data = self._data(split)
        return size == 1 and self._needs_two() and isinstance(data, HeldOut) and data.divides(split)

    def _endless(self, split: Split, first: int) -> Iterator[Batch]:
        """Yield batches from number ``first`` on, skipping earlier whole passes unread if their length is known."""
        length = self._data(split).length(split)
        skipped = first // length if length else 0
        return itertools.islice(self._passes(split, skipped), first - skipped * (length or 0), None)

    def _passes(self, split: Split, first: int) -> Iterator[Batch]:
        for number in itertools.count(first):
            batch = None
            for batch in self._with_translated_errors(split, _seeded(self._learnable(split), self._seed + number)):
                yield batch
            if batch is None:
                raise self.empty(split)

    def _single_rank(self, split: Split, workers: Workers, learnable: bool) -> Iterator[tuple[Any, Sequence[int], int]]:
        cached = self._cache.passed(split, partial(self._data(split).sized_batches, split))
        for batch, size, checksum in _seeded(cached, self._seed):
            if not (learnable and self._too_small(split, size)):
                yield batch, [size], checksum

    def _multi_rank(self, split: Split, workers: Workers, learnable: bool) -> Iterator[tuple[Any, Sequence[int], int]]:
        """Read only this rank's batches if the task has ``turns(split, rank, world)``, else all; yield this rank's."""
        rank_turns = getattr(self._data(split), "turns", None)
        if turns := rank_turns and rank_turns(split, workers.rank, workers.world_size):
            steps = _seeded(turns, self._seed, workers.world_size)
        else:
            source = self._learnable(split) if learnable else self._data(split).sized_batches(split)
            steps = _rank_batches(_seeded(source, self._seed), workers)
        for batch, sizes in steps:
            checksum = batches.checksum(self._task.unpadded(batch), _own(sizes, workers))
            yield batches.to_device(batch, self._device), sizes, checksum

    def _with_translated_errors(self, split: Split, source: Iterator[Any]) -> Iterator[Any]:
        """Yield from ``source``, converting its errors to TaskError: user code runs in loaders and batch methods."""
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
        except Exception as error:
            if isinstance(error, CkptavgError) or is_out_of_memory(error):
                raise
            raise task_error(self._task.source, f"{split}_dataloader", f"batch {number()}", error) from error


def _seeded(source: Iterator[Any], seed: int, world: int = 1) -> Iterator[Any]:
    """Yield from ``source``, reseeding before each batch, or each step of several ranks, equally on all ranks."""
    for number in itertools.count():
        signals.check()
        reseed(seed, number * world)
        batch = next(source, END)
        if batch is END:
            return
        yield batch


def _rank_batches(source: Iterator[Batch], workers: Workers) -> Iterator[tuple[Any, Sequence[int]]]:
    while turn := list(itertools.islice(source, workers.world_size)):
        yield _own(turn, workers).data, [batch.size for batch in turn]


def _own(turn: Sequence[_T], workers: Workers) -> _T:
    """Return this rank's entry of a turn of all ranks; the last one for a rank without an entry."""
    return turn[min(workers.rank, len(turn) - 1)]
