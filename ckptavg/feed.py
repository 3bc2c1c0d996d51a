"""The batches of a task as a search needs them: moved, counted, in the order of a seed, without end where asked."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ckptavg import batches
from ckptavg.determinism import seed_all
from ckptavg.errors import TaskError, is_out_of_memory
from ckptavg.meter import Meter
from ckptavg.objective import Split
from ckptavg.tasks import Task
from ckptavg.tasks.failure import failed
from ckptavg.tasks.held_out import HeldOut


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
    """

    def __init__(self, task: Task, scored_on: Split, device: torch.device, seed: int, meter: Meter) -> None:
        self._task = task
        self._device = device
        self._seed = seed
        self._meter = meter
        self._halves = HeldOut(task, scored_on, rest="fit", to="held", fraction=0.5, seed=seed)
        self._lengths: dict[Split, int] = {}
        self._streams: dict[Split, Iterator[Any]] = {}
        self.examples: dict[Split, int] = {}  # of the last whole pass
        self.order: dict[Split, int] = {}  # a checksum of the examples of the last whole pass, as they came
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

    def next(self, split: Split) -> Any:
        """The next batch to learn from, pass after pass."""
        if split not in self._streams:
            self._streams[split] = self._endless(split)
        return next(self._streams[split])

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
        seed_all(self._seed)
        seen, order = 0, 0
        for number, batch in enumerate(source, 1):
            with self._blamed(split, number):
                size = batches.size(batch)
                seen, order = seen + size, zlib.crc32(batches.sample(batch), order)
                moved = batches.to_device(batch, self._device)
            self._meter.count("forward", size)
            yield moved
        self.examples[split], self.order[split] = seen, order

    def _learnable(self, split: Split) -> Iterator[Any]:
        """What is left of a divided batch may be one example."""
        data = self._data(split)
        divided = isinstance(data, HeldOut)
        return (b for b in data.batches(split) if not (divided and self.needs_two and batches.size(b) == 1))

    def _endless(self, split: Split) -> Iterator[Any]:
        for pass_number in itertools.count():
            seed_all(self._seed + pass_number)
            number = 0
            for number, batch in enumerate(self._learnable(split), 1):
                with self._blamed(split, number):
                    moved = batches.to_device(batch, self._device)
                    batches.size(moved)  # whoever learns from it asks for that
                yield moved
            if not number:
                raise self.empty(split)

    @contextmanager
    def _blamed(self, split: Split, number: int) -> Generator[None]:
        """A batch may be an object of any class, whose methods may do anything."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise failed(self._task.source, f"{split}_dataloader", f"batch {number}", error) from error
