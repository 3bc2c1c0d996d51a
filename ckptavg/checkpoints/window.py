"""Filters that select candidates among the checkpoints found."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Final

from ckptavg.checkpoints.layouts import WEIGHT_NAMES
from ckptavg.declaration import AT_LEAST_1, CANDIDATES, MAIN, Help, Limit, check
from ckptavg.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.checkpoints.checkpoint import Checkpoint

ORDER_GIVEN: Final = "order given"
"""`Checkpoint.step_from` of checkpoints without training steps."""


def _filter(text: str, metavar: str, limit: Limit | None = None, panel: str = CANDIDATES, more: str = "") -> Help:
    """Declare a filter; a journal depends on the candidates that are left, and not on how they were chosen."""
    return Help(panel, text, more, metavar=metavar, limit=limit, changes_measurements=False)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Filters that select candidates; applied in the order of these attributes."""

    component: Annotated[str | None, _filter(
        "Which model of each step, such as unet or best.pth, where there are several.", "NAME")] = None  # fmt: skip
    step_from: Annotated[str | None, _filter(
        "Regular expression whose group is the training step in a name.", "REGEX")] = None  # fmt: skip
    include: Annotated[str | None, _filter("Only checkpoints whose name matches this glob.", "GLOB")] = None
    exclude: Annotated[str | None, _filter("No checkpoints whose name matches this glob.", "GLOB")] = None
    start: Annotated[int | None, _filter("First training step to use.", "STEP")] = None
    stop: Annotated[int | None, _filter("Last training step to use.", "STEP")] = None
    window: Annotated[int | None, _filter(
        "Only checkpoints at most STEPS before the last one of their run.", "STEPS", AT_LEAST_1,
        more="Directories of one checkpoint each are one run.")] = None  # fmt: skip
    every: Annotated[int | None, _filter("Every N-th checkpoint, counted back from the last.", "N", AT_LEAST_1)] = None
    last: Annotated[int | None, _filter("Use only the last N checkpoints.", "N", AT_LEAST_1, MAIN)] = None

    def __post_init__(self) -> None:
        check(self)
        if self.step_from is not None:
            try:
                re.compile(self.step_from)
            except re.error as error:
                raise UsageError(f"--step-from {self.step_from} is no regular expression: {error}") from error

    def admits(self, name: str, whole: str = "") -> bool:
        """Return whether the globs accept ``name``, a directory above it, the name of one of these, or ``whole``."""
        excluded = self.exclude is not None and _matches(name, whole, self.exclude)
        return not excluded and (self.include is None or _matches(name, whole, self.include))

    def select(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Return the checkpoints that the step and count filters keep, in the given order.

        Raises:
            UsageError: if there is a window of steps, and the steps are unknown.
        """
        start = -math.inf if self.start is None else self.start
        stop = math.inf if self.stop is None else self.stop
        kept = [checkpoint for checkpoint in checkpoints if start <= checkpoint.step <= stop]
        if self.window is not None:
            if unknown := [checkpoint.name for checkpoint in kept if checkpoint.step_from in ("", ORDER_GIVEN)]:
                hint = "name the step with --step-from REGEX, or count with --last N"
                raise UsageError(f"--window {self.window} needs training steps, and {unknown[-1]} has none", hint=hint)
            ends = {checkpoint.run: checkpoint.step for checkpoint in kept}  # in training order: the last one's remains
            kept = [checkpoint for checkpoint in kept if checkpoint.step >= ends[checkpoint.run] - self.window]
        return kept[:: -(self.every or 1)][: self.last][::-1]


def emptied(
    folders: Mapping[Path, Path], checkpoints: Sequence[Checkpoint], kept: Sequence[Checkpoint]
) -> list[str]:  # fmt: skip
    """Return a warning for each directory that has checkpoints, but none of those that the window keeps."""
    others = {folders.get(checkpoint.path) for checkpoint in kept}
    found = dict.fromkeys(folders[checkpoint.path] for checkpoint in checkpoints if checkpoint.path in folders)
    return [
        f"{folder}: all its checkpoints are outside the window of steps" for folder in found if folder not in others
    ]


def _matches(name: str, whole: str, glob: str) -> bool:
    path = PurePosixPath(name)
    if len(path.parts) > 1 and path.name in WEIGHT_NAMES:
        path = path.parent  # a usual name tells nothing
    parts = (path, *path.parents[:-1])
    return ("/" in glob and fnmatchcase(whole, glob)) or any(
        fnmatchcase(text, glob) for p in parts for text in (str(p), p.name)
    )
