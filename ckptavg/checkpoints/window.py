"""Filters that select candidates among the checkpoints found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Window:
    """Filters that select candidates; applied in the order of these attributes.

    Attributes:
        include: glob that names must match.
        exclude: glob that names must not match.
        start: first training step.
        stop: last training step, inclusive.
        every: keep every N-th, counted back from the last.
        last: keep the last N.
    """

    include: str | None = None
    exclude: str | None = None
    start: int | None = None
    stop: int | None = None
    every: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, not {value}")

    def admits(self, name: str) -> bool:
        """Return whether the globs accept ``name`` or one of its components."""
        return (self.include is None or _matches(name, self.include)) and (
            self.exclude is None or not _matches(name, self.exclude)
        )

    def select(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Return the checkpoints that the step and count filters keep, in the given order."""
        start = -math.inf if self.start is None else self.start
        stop = math.inf if self.stop is None else self.stop
        kept = [checkpoint for checkpoint in checkpoints if start <= checkpoint.step <= stop]
        return kept[:: -(self.every or 1)][: self.last][::-1]


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or any(fnmatchcase(part, glob) for part in Path(name).parts)
