"""The batches of a task as a search needs them: moved, counted, in the order of a seed, without end where asked."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch

from ckptavg import batches, interrupt
from ckptavg.determinism import reseed
from ckptavg.errors import CkptavgError, TaskError, is_out_of_memory
from ckptavg.kept import Kept
from ckptavg.meter import Meter
from ckptavg.objective import Split
from ckptavg.tasks import Task
from ckptavg.tasks.failure import failed
from ckptavg.tasks.held_out import HeldOut

_END: Final = object()


class Feed:
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
    """

    def __init__(self, task: Task, scored_on: Split, device: torch.device, seed: int, meter: Meter) -> None:
        self._task = task
        self._device = device
        self._seed = seed
        self._meter = meter
        self._halves = HeldOut(task, scored_on, rest="fit", to="held", fraction=0.5, seed=seed)
        self._lengths: dict[Split, int] = {}
        self._streams: dict[Split, Stream] = {}
        self._kept = Kept(device)
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

    def stream(self, split: Split) -> Stream:
        """The batches to learn from, pass after pass."""
        if split not in self._streams:
            self._streams[split] = Stream(lambda first: self._endless(split, first), self._seed)
        return self._streams[split]

    def scored(self, split: Split) -> Iterator[Any]:
        """One pass over all examples."""
        return self._passed(split, learnable=False)

    def learnable(self, split: Split) -> Iterator[Any]:
        """One pass over a split for statistics."""
        return self._passed(split, learnable=True)

    def empty(self, split: Split) -> TaskError:
        """What to say of a split without batches."""
        if split in ("fit", "held") or (isinstance(self._task, HeldOut) and split in ("val", "test")):
            what = f"the {split} part of the divided data is empty"
            return TaskError(what, path=self._task.source, hint="give it more data")
        return TaskError(f"{split}_dataloader() gave no batches", path=self._task.source)

    def _data(self, split: Split) -> Task:
        return self._halves if split in ("fit", "held") else self._task

    def _passed(self, split: Split, *, learnable: bool) -> Iterator[Any]:
        seen = self.order[split] = 0
        source = _seeded(self._kept.passed(split, partial(self._data(split).batches, split)), self._seed)
        for number, (batch, size, sample) in enumerate(self._blaming(split, source), 1):
            if learnable and self._too_small(split, size):
                continue
            seen += size
            self.order[split] = zlib.crc32(sample, self.order[split])
            self._meter.count("forward", size)
            reseed(self._seed, number)
            yield batch
        self.examples[split] = seen

    def _learnable(self, split: Split) -> Iterator[Any]:
        return (b for b in self._data(split).batches(split) if not self._too_small(split, batches.size(b)))

    def _too_small(self, split: Split, size: int) -> bool:
        """What is left of a divided batch may be one example."""
        return size == 1 and self.needs_two and isinstance(self._data(split), HeldOut)

    def _endless(self, split: Split, first: int) -> Iterator[Any]:
        """From batch number ``first`` on; whole passes before it are not read where their length is known."""
        length = self._data(split).length(split)
        skipped = first // length if length else 0
        return itertools.islice(self._passes(split, skipped), first - skipped * (length or 0), None)

    def _passes(self, split: Split, first: int) -> Iterator[Any]:
        for number in itertools.count(first):
            batch = None
            moved = (batches.to_device(batch, self._device) for batch in self._learnable(split))
            for batch in self._blaming(split, _seeded(moved, self._seed + number)):
                yield batch
            if batch is None:
                raise self.empty(split)

    def _blaming(self, split: Split, source: Iterator[Any]) -> Iterator[Any]:
        """The same batches; one may be an object of any class, whose methods may do anything."""
        for number in itertools.count(1):
            try:
                batch = next(source, _END)
            except CkptavgError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise failed(self._task.source, f"{split}_dataloader", f"batch {number}", error) from error
            if batch is _END:
                return
            yield batch


class Stream:
    """Batches one after the other."""

    def __init__(self, start: Callable[[int], Iterator[Any]], seed: int) -> None:
        self._start = start
        self._seed = seed
        self._source: Iterator[Any] | None = None
        self._at = self._fetched = -1
        self._batch: Any = None

    def advance(self) -> None:
        """Go on to the next batch; it is fetched when it is asked for."""
        self._at += 1

    @property
    def batch(self) -> Any:
        """The batch that it has come to; what is drawn after it was asked for is the same each time."""
        if self._source is None:
            self._source, self._fetched = self._start(self._at), self._at - 1
        while self._fetched < self._at:
            self._batch = next(self._source)
            self._fetched += 1
        reseed(self._seed, self._at + 1)
        return self._batch


def _seeded(source: Iterator[Any], seed: int) -> Iterator[Any]:
    for number in itertools.count():
        interrupt.check()
        reseed(seed, number)
        batch = next(source, _END)
        if batch is _END:
            return
        yield batch
