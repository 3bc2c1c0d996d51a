"""Task wrapper that moves part of one split's examples to another split."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ckptavg.errors import TaskError
from ckptavg.journal.tensor_json import raw
from ckptavg.score import Split
from ckptavg.tasks import Task
from ckptavg.tasks import batch as batches
from ckptavg.tasks.batch import Batch


class HeldOut(Task):
    """Task with a fraction of the examples of ``split`` moved to the split ``to``.

    The side of each example is decided by a hash of its content and the seed, so the same example is always on the
    same side, however a loader shuffles, and equal examples are never divided. Examples that differ from pass to pass
    (padded to a shuffled batch, randomly transformed) could change sides, which is a TaskError; for the same reason
    batches are not halved.

    ``rest`` and ``to`` name the splits of the remaining and the held-out examples.
    """

    def __init__(self, task: Task, split: Split, *, rest: Split, to: Split, fraction: float, seed: int) -> None:
        self._task = task
        self.notes: Sequence[str] = getattr(task, "notes", ())  # a list that grows
        self._split: Split = split
        self._sides: dict[Split, bool] = {rest: False, to: True}
        self._threshold = int(fraction * 2**64)
        self._key = f"{to} {seed}".encode()  # a second division must be independent of the first
        self._hash_sum: int | None = None  # of all examples of the first complete pass
        self.model = task.model
        self.loss = task.loss
        self.source = task.source
        self.corpus = task.corpus
        self.whole = task.whole
        self.metric = task.metric
        self.shared_forward = task.shared_forward
        self.unpadded = task.unpadded
        self.predict = task.predict
        self.probabilities = task.probabilities
        self.metric_name = task.metric_name
        self.metric_key = task.metric_key
        self.metric_goal = task.metric_goal
        self.metric_bounds = task.metric_bounds

    def divides(self, split: Split) -> bool:
        """Return whether ``split`` is one of the two parts."""
        return split in self._sides

    def has(self, split: Split) -> bool:
        """See `Task.has`."""
        return split in self._sides or self._task.has(split)

    def batches(self, split: Split) -> Iterator[Any]:
        """See `Task.batches`; yields the matching examples of each batch and skips batches without any."""
        return (batch for batch, _ in self.sized_batches(split))

    def sized_batches(self, split: Split) -> Iterator[Batch]:
        """See `Task.sized_batches`."""
        if split not in self._sides:
            yield from self._task.sized_batches(split)
            return
        total = 0
        for batch, size in self._task.sized_batches(self._split):
            hashes = self._hashes(batch, size)
            total += sum(hashes)
            held_B = torch.tensor([value < self._threshold for value in hashes], dtype=torch.bool)
            chosen_B = held_B if self._sides[split] else ~held_B
            if chosen_B.all():
                yield Batch(batch, size)
            elif chosen_B.any():
                try:
                    part = batches.select(batch, chosen_B)
                except TypeError as error:
                    raise self._indivisible(str(error)) from error
                yield Batch(part, int(chosen_B.sum()))
        self._hash_sum = total if self._hash_sum is None else self._hash_sum
        if self._hash_sum != total:
            raise self._indivisible(
                "its examples differ from pass to pass (padded to a shuffled batch, or transformed)"
            )

    def turns(self, split: Split, rank: int, world: int) -> Iterator[tuple[Any, Sequence[int]]] | None:
        """Return the task's own `turns`; None for a divided split, of which every rank must hash all batches."""
        turns = getattr(self._task, "turns", None)
        return None if split in self._sides or turns is None else turns(split, rank, world)

    def examples(self, split: Split) -> int | None:
        """See `Task.examples`; the size of a part is unknown before it is read."""
        return None if split in self._sides else self._task.examples(split)

    def positions(self, split: Split) -> Sequence[int] | None:
        """See `Task.positions`; the parts keep the order of the pass."""
        return None if split in self._sides else self._task.positions(split)

    def length(self, split: Split) -> int | None:
        """See `Task.length`."""
        return None if split in self._sides else self._task.length(split)

    def _hashes(self, batch: Any, size: int) -> list[int]:
        """Return a 64-bit hash of the content of each of the ``size`` examples."""
        digests = [hashlib.blake2b(key=self._key, digest_size=8) for _ in range(size)]
        empty = digests[0].digest() if digests else b""
        for leaf in batches.leaves(self.unpadded(batch), examples=size):
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == size:
                data = memoryview(raw(leaf))
                row = len(data) // size
                for i, digest in enumerate(digests):
                    digest.update(data[i * row : (i + 1) * row])
            elif isinstance(leaf, list | tuple) and len(leaf) == size:
                for digest, item in zip(digests, leaf, strict=True):
                    for part in batches.leaves(item):
                        digest.update(raw(part) if isinstance(part, Tensor) else repr(part).encode())
        if digests and digests[0].digest() == empty:
            raise self._indivisible(f"no examples were found in a {type(batch).__name__}")
        return [int.from_bytes(digest.digest(), "little") for digest in digests]

    def _indivisible(self, reason: str) -> TaskError:
        hint = "give test data (test_dataloader(), or --test) instead of --holdout, and leave out --patience"
        return TaskError(f"{self._split} data cannot be divided: {reason}", path=self.source, hint=hint)
