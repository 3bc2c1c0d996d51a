"""Training order of the candidates: by a step inside the files, else by a number of their names, else as given."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from ckptavg.checkpoints import kinds
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.listing import CheckpointPath
from ckptavg.checkpoints.name_steps import Opened, by_name
from ckptavg.checkpoints.steps import (
    STEP_KEYS,
    is_distinct,
    natural,
    numbers,
    step_by_pattern,
)
from ckptavg.checkpoints.window import ORDER_GIVEN
from ckptavg.errors import CkptavgError, InputError, choosing, escaped_glob
from ckptavg.readers import Reader


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
        if not explicit or opened[0].place.globbed:
            shapes = [_shapes(one.checkpoint) for one in opened]
            kinds.check([one.place.entry for one in opened], shapes, [one.checkpoint.key for one in opened])
        stepped = _with_steps(opened, step_from, explicit, warnings)
        given = {one.checkpoint.reader: one.place.order if one.place.explicit else 0 for one in opened}
        ordered = sorted(stepped, key=lambda one: (one.step, one.run, given[one.reader], natural(one.name)))
        if not explicit or opened[0].place.globbed:
            _check_distinct(ordered, {one.checkpoint.reader: one.place for one in opened})
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
    if explicit and ordered != sorted(ordered, key=lambda one: given[one.reader]):
        names = ", ".join(one.name for one in ordered[:3]) + (", …" if len(ordered) > 3 else "")
        warnings.append(f"ordered by their steps, not as they were given: {names}")
    return ordered, warnings


class _NoStepError(Exception):
    def __init__(self, odd: Opened, error: InputError) -> None:
        super().__init__()
        self.odd, self.error = odd, error


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
    if not distinct and (named := by_name(opened, runs)) and (is_distinct([c.step for c in named], runs) or not shared):
        return named
    if distinct or shared:
        kind = (distinct or shared)[0]
        warnings += _contradiction(opened, runs, [steps[kind] for steps in inside], kind)
        return [replace(one.checkpoint, step=one.checkpoint.steps[kind], step_from=kind) for one in opened]
    if len(opened) == 1:
        return [replace(opened[0].checkpoint, step=1, step_from="a single checkpoint")]
    if not explicit:
        return _by_run(opened, runs, warnings)
    return _as_given(opened, warnings)


def _contradiction(opened: Sequence[Opened], runs: Sequence[int], steps: Sequence[int], kind: str) -> list[str]:
    """Return a warning if the steps inside the files have another order than the numbers of their names."""
    try:
        named = by_name(opened, runs)
    except InputError:
        return []
    pairs = sorted(zip(steps, (one.step for one in named), strict=True)) if named else []
    if all(a[1] <= b[1] for a, b in pairwise(pairs)):
        return []
    return [f"ordered by {kind} in the files, which is not the order of the numbers in their names"]


def _by_run(opened: Sequence[Opened], runs: Sequence[int], warnings: list[str]) -> list[Checkpoint]:
    """Return the checkpoints of several runs, each with the steps of its own names."""
    stepped: list[Checkpoint] = []
    for run in dict.fromkeys(runs):
        own = [one for one, its in zip(opened, runs, strict=True) if its == run]
        named = by_name(own, [run] * len(own)) if len(own) < len(opened) and len(own) > 1 else []
        if not named:
            raise _no_step(opened)
        stepped += named
    warnings.append("the runs have steps of different kinds in their names")
    return stepped


def _runs(opened: Sequence[Opened]) -> list[int]:
    """Return the run of each checkpoint; runs of one checkpoint each are one run."""
    runs = [one.checkpoint.run for one in opened]
    return [0] * len(runs) if len(set(runs)) == len(runs) else runs


def _by_pattern(step_from: str, one: Opened) -> int:
    step = step_by_pattern(re.compile(step_from), one.place.label)
    if step is None:
        hint = f"leave it out with {one.checkpoint.excluding}"
        raise InputError(
            f"--step-from {step_from} finds nothing in {one.place.label}",
            path=one.place.path,
            hint=hint,
        )
    return step


def _as_given(opened: Sequence[Opened], warnings: list[str]) -> list[Checkpoint]:
    """Return the checkpoints in the order of the command line, unless the numbers that most have contradict it.

    It must be the user's: not that in which a shell sorts texts, unless the numbers in them have the same order.
    """
    given = sorted(opened, key=lambda one: one.place.order)
    paths = [str(one.place.weights) for one in given]
    if paths == sorted(paths) != sorted(paths, key=natural):
        raise _no_step(opened, "; the order given is that of a shell's glob")
    counts = _differing(given)
    kind, count = counts.most_common(1)[0] if counts else ("", 0)
    known = [one for one in given if kind in one.checkpoint.steps] if count > 1 else []
    for before, after in pairwise(known):
        if before.checkpoint.steps[kind] > after.checkpoint.steps[kind]:
            raise _no_step(opened, f"; {before.place.label} was given before {after.place.label}")
    warnings.append(f"{'some have' if known else 'there is'} no training step: the order is the one given")
    steps: list[int] = []
    for one in given:
        steps.append(one.checkpoint.steps.get(kind, steps[-1] + 1 if steps else 1) if known else len(steps) + 1)
    pairs = zip(given, steps, strict=True)
    return [replace(one.checkpoint, step=step, step_from=ORDER_GIVEN) for one, step in pairs]


def _differing(opened: Sequence[Opened]) -> Counter[str]:
    """Count the checkpoints that have each kind of step, of those kinds that differ between them if there are any."""
    counts = Counter(kind for one in opened for kind in one.checkpoint.steps)
    values = {kind: {one.checkpoint.steps.get(kind) for one in opened} - {None} for kind in counts}
    differing = Counter({kind: count for kind, count in counts.items() if len(values[kind]) > 1})
    return differing or counts


def _no_step(opened: Sequence[Opened], why: str = "") -> "_NoStepError | InputError":
    groups = Counter(kinds.pattern(one.place.entry) for one in opened)
    if len(groups) > 1 and min(groups.values()) > 1:
        return kinds.several(f"{len(groups)} kinds of names", [one.place.entry for one in opened])
    counts = _differing(opened)
    usual = counts.most_common(1)[0][0] if counts else ""
    lacking = [one for one in opened if usual not in one.checkpoint.steps] or list(opened)
    patterns = {kinds.pattern(one.place.entry) for one in lacking}
    ways = "name the checkpoints in their order"
    if len(lacking) == 1:
        ways = f"leave it out with {lacking[0].checkpoint.excluding}, or {ways}"
    elif len(lacking) < len(opened) and len(patterns) == 1:
        ways = f"leave such files out with {choosing('--exclude', patterns.pop())}, or {ways}"
    what = "has no training step of a kind that the other checkpoints have too, neither inside nor in its name"
    return _NoStepError(lacking[0], InputError(what + why, path=lacking[0].checkpoint.path, hint=ways))


def _check_distinct(ordered: Sequence[Checkpoint], places: Mapping[Reader, CheckpointPath]) -> None:
    """Raise InputError if two checkpoints of a run have the same step, as raw and averaged weights have."""
    for a, b in pairwise(ordered):
        roots = [one.path.parent for one in (a, b)] if places[a.reader].explicit else [one.run for one in (a, b)]
        if a.step != b.step or roots[0] != roots[1]:
            continue
        names = [places[one.reader].entry for one in ordered if one.run == a.run]
        if len(set(map(kinds.pattern, names))) > 1:
            raise kinds.several(f"two files of step {a.step}", names)
        ways = _groups(names) or [f"leave one out with {a.excluding}"]
        raise InputError(
            f"has the step {a.step} of {a.entry} too", path=b.path, hint=f"choose with {' or '.join(ways)}"
        )


def _groups(names: Sequence[str]) -> list[str]:
    """Return options that choose one group of ``names`` each: those with the same number in one place."""
    for label in numbers(names[0]):
        if not all(label in numbers(name) for name in names):
            continue
        stops = [numbers(name)[label].stop for name in names]
        starts = {name[:stop]: name[stop : stop + 1] for name, stop in zip(names, stops, strict=True)}
        if 1 < len(starts) < len(names):
            return [
                choosing("--include", f"{escaped_glob(start)}{escaped_glob(rest)}*") for start, rest in starts.items()
            ]
    return []
