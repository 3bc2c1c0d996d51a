"""The batches of a task as a search needs them: moved, counted, in the order of a seed, without end where asked."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from ckptavg import batches, interrupt
from ckptavg.determinism import reseed
from ckptavg.errors import TaskError
from ckptavg.meter import Meter
from ckptavg.objective import Split
from ckptavg.tasks import Task
from ckptavg.tasks.held_out import HeldOut

_END: Final = object()


class Feed:
    """What a task's loaders give, on the device.

    The splits ``fit`` and ``held`` are the two halves of what is scored on. Global generators are seeded before each
    batch is fetched, so loaders that shuffle by them repeat themselves, and what a loss draws for one batch does not
    depend on those before it, which an interrupted run may have done already.

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
        self.examples: dict[Split, int] = {}  # of the last whole pass
        self.order: dict[Split, int] = {}  # a checksum of the examples of the last pass so far, as they came
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

    def stream(self, split: Split) -> Stream:
        """The batches to learn from, pass after pass."""
        if split not in self._streams:
            self._streams[split] = Stream(lambda first: self._endless(split, first), self._device, self._seed)
        return self._streams[split]

    def scored(self, split: Split) -> Iterator[Any]:
        """One pass over all examples."""
        return self._passed(split, self._data(split).batches(split))

    def learnable(self, split: Split) -> Iterator[Any]:
        """One pass over a split for statistics."""
        return self._passed(split, self._learnable(split))

    def empty(self, split: Split) -> TaskError:
        """What to say of a split without batches."""
        if split in ("fit", "held") or (isinstance(self._task, HeldOut) and split in ("val", "test")):
            what = f"the {split} part of the divided data is empty"
            return TaskError(what, path=self._task.source, hint="give it more data")
        return TaskError(f"{split}_dataloader() gave no batches", path=self._task.source)

    def _data(self, split: Split) -> Task:
        return self._halves if split in ("fit", "held") else self._task

    def _passed(self, split: Split, source: Iterator[Any]) -> Iterator[Any]:
        seen = self.order[split] = 0
        for batch in _seeded(source, self._seed):
            size = batches.size(batch)
            seen += size
            self.order[split] = zlib.crc32(batches.sample(batch), self.order[split])
            self._meter.count("forward", size)
            yield batches.to_device(batch, self._device)
        self.examples[split] = seen

    def _learnable(self, split: Split) -> Iterator[Any]:
        """What is left of a divided batch may be one example."""
        data = self._data(split)
        divided = isinstance(data, HeldOut)
        return (b for b in data.batches(split) if not (divided and self.needs_two and batches.size(b) == 1))

    def _endless(self, split: Split, first: int) -> Iterator[Any]:
        """From batch number ``first`` on; whole passes before it are not read where their length is known."""
        length = self._data(split).length(split)
        skipped = first // length if length else 0
        return itertools.islice(self._passes(split, skipped), first - skipped * (length or 0), None)

    def _passes(self, split: Split, first: int) -> Iterator[Any]:
        for number in itertools.count(first):
            batch = None
            for batch in _seeded(self._learnable(split), self._seed + number):
                yield batch
            if batch is None:
                raise self.empty(split)


class Stream:
    """Batches one after the other; only the last of those that were passed is on the device."""

    def __init__(self, start: Callable[[int], Iterator[Any]], device: torch.device, seed: int) -> None:
        self._start = start
        self._device = device
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
            if self._fetched == self._at:
                self._batch = batches.to_device(self._batch, self._device)
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
