"""Training order of the candidates: by a step inside the files, else by a number of their names, else as given."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePath

from ckptavg.checkpoints import kinds
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.listing import CheckpointPath
from ckptavg.checkpoints.steps import (
    STEP_KEYS,
    AmbiguousStepError,
    Column,
    is_distinct,
    natural,
    pattern_of,
    step_by_pattern,
    step_column,
    steps_in_name,
)
from ckptavg.errors import CkptavgError, InputError
from ckptavg.readers import suffixes


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open checkpoint and its place."""

    checkpoint: Checkpoint
    place: CheckpointPath
    aside: str = ""  # why its name says that it is no candidate


def in_order(
    opened: Sequence[Opened], step_from: str | None, refuse: Callable[[CkptavgError, Path], None] | None
) -> tuple[list[Checkpoint], Sequence[str]]:
    """Return the checkpoints in training order with steps of one kind, and warnings about the order.

    Args:
        opened: the candidates.
        step_from: the regular expression whose group is the step, if the user gave one.
        refuse: gets the error about the kinds of candidates, or about one without a step; without it, it is raised.
    """
    warnings: list[str] = []
    if not opened:
        return [], ()
    explicit = all(one.place.explicit for one in opened)
    try:
        if not explicit:
            kinds.check([one.place.entry for one in opened], [_shapes(one.checkpoint) for one in opened])
        stepped = _with_steps(opened, step_from, explicit, warnings)
        ordered = sorted(stepped, key=lambda one: (one.step, one.run, _given(one, opened), natural(one.name)))
        if not explicit:
            _check_distinct(ordered)
    except _NoStepError as missing:
        if refuse is None:
            raise missing.error from None
        refuse(missing.error, missing.odd.checkpoint.path)
        return in_order([one for one in opened if one is not missing.odd], step_from, refuse)
    except InputError as error:
        if refuse is None:
            raise
        hint = f" ({error.hint})" if error.hint else ""
        return sorted((one.checkpoint for one in opened), key=lambda one: natural(one.name)), [f"{error}{hint}"]
    if explicit and ordered != sorted(ordered, key=lambda one: _given(one, opened)):
        names = ", ".join(one.name for one in ordered[:3]) + (", …" if len(ordered) > 3 else "")
        warnings.append(f"ordered by their steps, not as they were given: {names}")
    return ordered, warnings


class _NoStepError(Exception):
    def __init__(self, odd: Opened, error: InputError) -> None:
        super().__init__()
        self.odd, self.error = odd, error


def _given(checkpoint: Checkpoint, opened: Sequence[Opened]) -> int:
    """Return the index of the path that was given for a checkpoint, 0 for those of a directory."""
    return next((o.place.order for o in opened if o.checkpoint.reader is checkpoint.reader and o.place.explicit), 0)


def _shapes(checkpoint: Checkpoint) -> dict[str, object]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def _with_steps(
    opened: Sequence[Opened], step_from: str | None, explicit: bool, warnings: list[str]
) -> list[Checkpoint]:
    runs = _runs(opened)
    if step_from is not None:
        return [replace(one.checkpoint, step=_by_pattern(step_from, one), step_from="--step-from") for one in opened]
    inside = [one.checkpoint.steps for one in opened]
    shared = [kind for kind in STEP_KEYS if all(kind in steps for steps in inside)]
    distinct = [kind for kind in shared if is_distinct([steps[kind] for steps in inside], runs)]
    if (
        not distinct
        and (named := _by_name(opened, runs))
        and (is_distinct([c.step for c in named], runs) or not shared)
    ):
        return named
    if distinct or shared:
        kind = (distinct or shared)[0]
        return [replace(one.checkpoint, step=one.checkpoint.steps[kind], step_from=kind) for one in opened]
    if len(opened) == 1:
        return [replace(opened[0].checkpoint, step=1, step_from="a single checkpoint")]
    if not explicit:
        raise _no_step(opened)
    return _as_given(opened, warnings)


def _runs(opened: Sequence[Opened]) -> list[int]:
    """Return the run of each checkpoint; runs of one checkpoint each are one run."""
    runs = [one.checkpoint.run for one in opened]
    return [0] * len(runs) if len(set(runs)) == len(runs) else runs


def _by_pattern(step_from: str, one: Opened) -> int:
    step = step_by_pattern(re.compile(step_from), one.place.name)
    if step is None:
        hint = f"leave it out with {one.checkpoint.excluding}"
        raise InputError(f"--step-from {step_from} finds nothing in {one.place.name}", path=one.place.path, hint=hint)
    return step


def _by_name(opened: Sequence[Opened], runs: Sequence[int]) -> list[Checkpoint]:
    """Return the checkpoints with the step in their names, else in those of their directories, the innermost first.

    Empty if there is no such number. A name gets the directories in front that the number is in.
    """
    paths = [PurePath(os.path.abspath(one.place.weights)) for one in opened]  # noqa: PTH100  # links stay
    common = len(PurePath(os.path.commonpath(paths)).parts)
    inside = {one.place.path != one.place.weights for one in opened}
    if len(inside) > 1:  # files beside directories, whose own names say what those of their files do not
        paths = [PurePath(os.path.abspath(one.place.path)) for one in opened]  # noqa: PTH100
    own = [(one.place.entry if len(inside) > 1 else one.place.name).count("/") + 1 for one in opened]
    parts = [path.parts[-max(n, len(path.parts) - common) :] for path, n in zip(paths, own, strict=True)]
    fallback: list[Checkpoint] = []
    for level in range(max(map(len, parts))):
        names = [_stem(each[-1 - level]) if level < len(each) else "" for each in parts]
        try:
            column = step_column(names, runs)
        except AmbiguousStepError as ambiguous:
            raise _ambiguous(opened, names, ambiguous.columns) from None
        if column is None:
            continue
        named: list[Checkpoint] = []
        for one, value, each, length in zip(opened, column.values, parts, own, strict=True):
            name = one.place.name if level < length else "/".join(each[-1 - level :])
            steps = {**one.checkpoint.steps, **steps_in_name(name)}
            named.append(replace(one.checkpoint, name=name, steps=steps, step=value, step_from="name"))
        if is_distinct(column.values, runs):
            return named
        fallback = fallback or named
    return fallback


def _stem(name: str) -> str:
    """Return a file name without the suffix of its format."""
    endings = [suffix for suffix in suffixes() if name.endswith(suffix)]
    return name.removesuffix(max(endings, key=len, default=""))


def _ambiguous(opened: Sequence[Opened], names: Sequence[str], columns: Sequence[Column]) -> InputError:
    shown = "; ".join(
        f"{column.label or 'the first'}: {', '.join(map(str, sorted(column.values)[:4]))}" for column in columns
    )
    patterns = [pattern for column in columns if (pattern := pattern_of(names, column.label))]
    hint = (
        " or ".join(f"--step-from '{pattern}'" for pattern in patterns) or "--step-from REGEX (its group is the step)"
    )
    what = f"several numbers in the names could be the training step: {shown}"
    return InputError(what, path=opened[0].place.path.parent, hint=f"choose with {hint}")


def _as_given(opened: Sequence[Opened], warnings: list[str]) -> list[Checkpoint]:
    """Return the checkpoints in the order of the command line, unless the numbers that most have contradict it."""
    given = sorted(opened, key=lambda one: one.place.order)
    counts = Counter(kind for one in given for kind in one.checkpoint.steps)
    kind, count = counts.most_common(1)[0] if counts else ("", 0)
    known = [one for one in given if kind in one.checkpoint.steps] if count > 1 else []
    for before, after in pairwise(known):
        if before.checkpoint.steps[kind] > after.checkpoint.steps[kind]:
            raise _no_step(opened, f"; {before.place.name} was given before {after.place.name}")
    warnings.append(f"{'some have' if known else 'there is'} no training step: the order is the one given")
    steps: list[int] = []
    for one in given:
        steps.append(one.checkpoint.steps.get(kind, steps[-1] + 1 if steps else 1) if known else len(steps) + 1)
    pairs = zip(given, steps, strict=True)
    return [replace(one.checkpoint, step=step, step_from="order given") for one, step in pairs]


def _no_step(opened: Sequence[Opened], why: str = "") -> "_NoStepError":
    counts = Counter(kind for one in opened for kind in one.checkpoint.steps)
    usual = counts.most_common(1)[0][0] if counts else ""
    odd = next((one for one in opened if usual not in one.checkpoint.steps), opened[0])
    what = "has no training step of a kind that the other checkpoints have too, neither inside nor in its name"
    hint = f"leave it out with {odd.checkpoint.excluding}, or name the checkpoints in their order"
    return _NoStepError(odd, InputError(what + why, path=odd.checkpoint.path, hint=hint))


def _check_distinct(ordered: Sequence[Checkpoint]) -> None:
    """Raise InputError if two checkpoints of a run have the same step, as raw and averaged weights have."""
    for a, b in pairwise(ordered):
        if (a.step, a.run) == (b.step, b.run):
            names = [one.entry for one in ordered if one.run == a.run]
            if len(set(map(kinds.pattern, names))) > 1:
                raise kinds.several(f"two files of step {a.step}", names)
            hint = f"leave one out with {a.excluding}, or say with --step-from REGEX which number is the step"
            raise InputError(f"has the step {a.step} of {a.entry} too", path=b.path, hint=hint)
