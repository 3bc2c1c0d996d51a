"""Training steps of open checkpoints by the numbers in their names and in those of their directories."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePath

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.listing import CheckpointPath
from ckptavg.checkpoints.steps import (
    STEP_WORDS,
    AmbiguousStepError,
    Column,
    agree,
    columns,
    is_distinct,
    pattern_of,
    step_by_pattern,
    step_column,
    steps_in_name,
)
from ckptavg.errors import InputError, UsageError
from ckptavg.readers import suffixes


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open checkpoint and its place."""

    checkpoint: Checkpoint
    place: CheckpointPath
    aside: str = ""  # why its name says that it is no candidate


def by_name(opened: Sequence[Opened], runs: Sequence[int]) -> list[Checkpoint]:
    """Return the checkpoints with the step in their names, else in those of their directories, the innermost first.

    Empty if there is no such number. A name gets the directories in front that the number is in.
    """
    paths = [PurePath(os.path.abspath(one.place.weights)) for one in opened]  # noqa: PTH100  # links stay
    common = len(PurePath(os.path.commonpath(paths)).parts)
    inside = {one.place.path != one.place.weights for one in opened}
    if len(inside) > 1:  # files beside directories, whose own names say what those of their files do not
        paths = [PurePath(os.path.abspath(one.place.path)) for one in opened]  # noqa: PTH100
    own = [(one.place.entry if len(inside) > 1 else one.place.label).count("/") + 1 for one in opened]
    parts = [path.parts[-max(n, len(path.parts) - common) :] for path, n in zip(paths, own, strict=True)]
    fallback: list[Checkpoint] = []
    depth = max(map(len, parts))
    for level in range(depth):
        names = [_stem(each[-1 - level]) if level < len(each) else "" for each in parts]
        try:
            column = step_column(names, runs)
        except AmbiguousStepError as ambiguous:
            raise _ambiguous(opened, [(names, column) for column in ambiguous.columns]) from None
        if column is None:
            continue
        named: list[Checkpoint] = []
        for one, value, each, length in zip(opened, column.values, parts, own, strict=True):
            name = one.place.label if level < length else "/".join(each[-1 - level :])
            steps = {**one.checkpoint.steps, **steps_in_name(name)}
            named.append(replace(one.checkpoint, name=name, steps=steps, step=value, step_from="name"))
        if is_distinct(column.values, runs):
            for outer in range(level + 1, depth):
                above = [each[-1 - outer] if outer < len(each) else "" for each in parts]
                telling = (c for c in columns(above) if c.is_date or c.label in STEP_WORDS)
                if other := next((c for c in telling if not agree(column.values, c.values)), None):
                    raise _ambiguous(opened, [(names, column), (above, other)])
            return named
        fallback = fallback or named
    return fallback


def _stem(name: str) -> str:
    """Return a file name without the suffix of its format."""
    endings = [suffix for suffix in suffixes() if name.endswith(suffix)]
    return name.removesuffix(max(endings, key=len, default=""))


def _ambiguous(opened: Sequence[Opened], columns: Sequence[tuple[Sequence[str], Column]]) -> InputError:
    """Return the error that shows the ``columns``, each of some names, and an option that chooses each."""
    labels = [one.place.label for one in opened]
    shown: list[str] = []
    ways: list[str] = []
    for names, column in columns:
        shown.append(f"{column.label.strip() or 'the first'}: {', '.join(map(str, sorted(column.values)[:4]))}")
        pattern = pattern_of(names, column.label) if len(set(column.values)) == len(names) else None
        if pattern and _finds(pattern, labels, column.values):
            ways.append(f"--step-from '{pattern}'")
    several = "several numbers in the names could be" if len(columns) > 1 else "a number behind a metric may be"
    hint = f"choose with {' or '.join(ways)}" if ways else "say which one is the step with --step-from REGEX"
    what = f"{several} the training step: {'; '.join(shown)}"
    return InputError(what, path=opened[0].place.path.parent, hint=hint)


def _finds(pattern: str, labels: Sequence[str], values: Sequence[int]) -> bool:
    """Return whether ``pattern`` finds the ``values`` in whole labels too."""
    with suppress(UsageError):
        return [step_by_pattern(re.compile(pattern), label) for label in labels] == list(values)
    return False
