"""Task wrapper for the loss on a part of the data."""

import itertools
from collections.abc import Iterator
from typing import Any

from ckptavg.score import Split
from ckptavg.tasks import Task
from ckptavg.tasks.batch import Batch


class Sampled(Task):
    """Task with the loss alone, on every m-th batch of each split, m being the ratio of its examples to ``examples``.

    Batches are spread evenly over a pass, because a file may be sorted by class or by length.
    """

    def __init__(self, task: Task, examples: int) -> None:
        self._task = task
        self._examples = examples
        self._totals: dict[Split, int] = {}
        self.model = task.model
        self.loss = task.loss
        self.source = task.source
        self.has = task.has
        self.halve = task.halve

    def total(self, split: Split) -> int:
        """Return the number of examples of the whole split; counted by reading it once if the task does not tell."""
        if split not in self._totals:
            total = self._task.examples(split)
            self._totals[split] = sum(b.size for b in self._task.sized_batches(split)) if total is None else total
        return self._totals[split]

    def batches(self, split: Split) -> Iterator[Any]:
        """See `Task.batches`."""
        return (batch for batch, _ in self.sized_batches(split))

    def sized_batches(self, split: Split) -> Iterator[Batch]:
        """See `Task.sized_batches`."""
        every = max(1, round(self.total(split) / self._examples))
        return itertools.islice(self._task.sized_batches(split), 0, None, every)
