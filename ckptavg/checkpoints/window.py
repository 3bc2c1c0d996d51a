"""Filters that select candidates among the checkpoints found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ckptavg.declaration import AT_LEAST_1, CANDIDATES, MAIN, Help, Limit, check

if TYPE_CHECKING:
    from ckptavg.checkpoints.checkpoint import Checkpoint


def _filter(text: str, metavar: str, limit: Limit | None = None, panel: str = CANDIDATES) -> Help:
    """Declare a filter; a journal depends on the candidates that are left, and not on how they were chosen."""
    return Help(panel, text, metavar=metavar, limit=limit, changes_measurements=False)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Filters that select candidates; applied in the order of these attributes."""

    include: Annotated[str | None, _filter("Only checkpoints whose name matches this glob.", "GLOB")] = None
    exclude: Annotated[str | None, _filter("No checkpoints whose name matches this glob.", "GLOB")] = None
    start: Annotated[int | None, _filter("First training step to use.", "STEP")] = None
    stop: Annotated[int | None, _filter("Last training step to use.", "STEP")] = None
    every: Annotated[int | None, _filter("Every N-th checkpoint, counted back from the last.", "N", AT_LEAST_1)] = None
    last: Annotated[int | None, _filter("Use only the last N checkpoints.", "N", AT_LEAST_1, MAIN)] = None

    def __post_init__(self) -> None:
        check(self)

    def admits(self, name: str) -> bool:
        """Return whether the globs accept ``name`` or one of its components."""
        excluded = self.exclude is not None and _matches(name, self.exclude)
        return not excluded and (self.include is None or _matches(name, self.include))

    def select(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Return the checkpoints that the step and count filters keep, in the given order."""
        start = -math.inf if self.start is None else self.start
        stop = math.inf if self.stop is None else self.stop
        kept = [checkpoint for checkpoint in checkpoints if start <= checkpoint.step <= stop]
        return kept[:: -(self.every or 1)][: self.last][::-1]


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or any(fnmatchcase(part, glob) for part in Path(name).parts)
