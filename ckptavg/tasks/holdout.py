"""A task that keeps a part of one split's examples to itself, and gives them as another split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ckptavg.errors import TaskError
from ckptavg.score import Split
from ckptavg.tasks import Task
from ckptavg.tasks import batch as batches


class HeldOut:
    """The same task, a fraction of the examples of ``split`` moved to the split ``to``.

    Which ones is decided for each by a hash of its content and the seed, so the same example is always on the same
    side, however a loader shuffles, and two equal ones never lie on different sides. Examples that are not the same
    in every pass (padded to a shuffled batch, randomly transformed) could change sides, which is a TaskError.

    Args:
        task: the task as it is.
        split: whose examples are divided.
        rest: the split under which those that stay are given.
        to: the split under which the held-out ones are given.
        fraction: of the examples to hold out, between 0 and 1.
        seed: of the hash.
    """

    def __init__(self, task: Task, split: Split, *, rest: Split, to: Split, fraction: float, seed: int) -> None:
        self._task = task
        self._split: Split = split
        self._sides: dict[Split, bool] = {rest: False, to: True}
        self._below = int(fraction * 2**64)
        self._key = f"{to} {seed}".encode()  # divided twice, the halves must not follow each other
        self._all: int | None = None  # the sum of all examples' hashes
        self.source = task.source
        self.metric = task.metric
        self.metric_goal = task.metric_goal
        self.metric_bounds = task.metric_bounds
        self.corpus = task.corpus
        self.whole = task.whole

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return self._task.model()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """See `Task.loss`."""
        return self._task.loss(model, batch)

    @property
    def notes(self) -> Sequence[str]:
        """See `ckptavg.tasks.python_file.PythonTask`."""
        return getattr(self._task, "notes", ())

    def divides(self, split: Split) -> bool:
        """Whether a split is one of the two parts."""
        return split in self._sides

    def has(self, split: Split) -> bool:
        """See `Task.has`."""
        return split in self._sides or self._task.has(split)

    def batches(self, split: Split) -> Iterator[Any]:
        """See `Task.batches`; what is left of each batch, those without any example left out."""
        if split not in self._sides:
            yield from self._task.batches(split)
            return
        total = 0
        for batch in self._task.batches(self._split):
            hashes = self._hashes(batch)
            total += sum(hashes)
            held_B = torch.tensor([one < self._below for one in hashes], dtype=torch.bool)
            chosen_B = held_B if self._sides[split] else ~held_B
            if chosen_B.all():
                yield batch
            elif chosen_B.any():
                yield self._select(batch, chosen_B)
        if self._all is None:
            self._all = total
        elif self._all != total:
            raise self._indivisible(
                "its examples differ from pass to pass (padded to a shuffled batch, or transformed)"
            )

    def turns(self, split: Split, rank: int, world: int) -> Iterator[tuple[Any, Sequence[int]]] | None:
        """See `ckptavg.batches.loader.Feed`; who divides must see all."""
        turns = getattr(self._task, "turns", None)
        return None if split in self._sides or turns is None else turns(split, rank, world)

    def examples(self, split: Split) -> int | None:
        """See `Task.examples`; of a part it is known only when it was read."""
        return None if split in self._sides else self._task.examples(split)

    def halve(self) -> bool:
        """See `Task.halve`; batches are divided as they are, so they keep their size."""
        return False

    def length(self, split: Split) -> int | None:
        """See `Task.length`."""
        return None if split in self._sides else self._task.length(split)

    def _hashes(self, batch: Any) -> list[int]:
        """64 bits of each example's content."""
        size = batches.size(batch)
        digests = [hashlib.blake2b(key=self._key, digest_size=8) for _ in range(size)]
        empty = digests[0].digest() if digests else b""
        for leaf in batches.leaves(batch):
            if isinstance(leaf, Tensor):
                if leaf.ndim and leaf.shape[0] == size:
                    data = memoryview(_bytes(leaf))
                    row = len(data) // size
                    for i, digest in enumerate(digests):
                        digest.update(data[i * row : (i + 1) * row])
            elif isinstance(leaf, list | tuple) and len(leaf) == size:
                for digest, item in zip(digests, leaf, strict=True):
                    digest.update(repr(item).encode())
        if digests and digests[0].digest() == empty:
            raise self._indivisible(f"a {type(batch).__name__} shows no examples")
        return [int.from_bytes(digest.digest(), "little") for digest in digests]

    def _select(self, batch: Any, chosen_B: Tensor) -> Any:
        try:
            return batches.select(batch, chosen_B)
        except TypeError as error:
            raise self._indivisible(str(error)) from error

    def _indivisible(self, why: str) -> TaskError:
        return TaskError(
            f"{self._split} data cannot be divided: {why}",
            path=self.source,
            hint="give the task a test_dataloader() instead of --holdout, and leave out --patience",
        )


def _bytes(tensor: Tensor) -> bytearray:
    data = bytearray(tensor.nbytes)
    if data:
        torch.frombuffer(data, dtype=tensor.dtype).copy_(tensor.flatten())
    return data
