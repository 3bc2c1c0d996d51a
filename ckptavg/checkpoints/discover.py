"""Find checkpoints in directories, in training order, with a reason for every file that is left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self, TypeAlias

from ckptavg.checkpoints import duplicates, state_dict
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.listing import CheckpointPath, LeftOut, SkipFile, list_checkpoints
from ckptavg.checkpoints.steps import common_kind, natural, step_in_name, steps_inside, trainer_step
from ckptavg.checkpoints.window import Window
from ckptavg.errors import CkptavgError, InputError, excluding
from ckptavg.readers import open_reader

_Refuse: TypeAlias = Callable[[CkptavgError, Path], None]


@dataclass(frozen=True, kw_only=True)
class Discovered:
    """Open candidates in training order and the files left out; a context manager that closes the files."""

    checkpoints: tuple[Checkpoint, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for checkpoint in self.checkpoints:
            checkpoint.reader.close()


def discover(
    paths: Sequence[Path], window: Window | None = None, key: str | None = None, *,
    bad: Literal["refuse", "skip", "list"] = "refuse", check: Callable[[Checkpoint], None] | None = None,
    allow_nonfinite: bool = False,
) -> Discovered:  # fmt: skip
    """Find, open (headers only), order and filter the checkpoints that ``paths`` name.

    Args:
        paths: directories of checkpoints (several: several runs), or checkpoints themselves.
        window: filter on names, steps and counts.
        key: the sub-dictionary of each file that holds the model.
        bad: ``refuse`` raises for a bad checkpoint; ``skip`` leaves it out as if it did not exist; ``list`` does so too
            and accepts an empty result.
        check: raises InputError for a bad candidate; called once for each one that the window selects.
        allow_nonfinite: accept NaN and infinite weights.
    Raises:
        InputError: if no checkpoint is found, or one is bad or has no training step.
    """
    window = window or Window()
    left_out: list[LeftOut] = []
    opened: list[_Opened] = []

    def refuse(error: CkptavgError, path: Path) -> None:
        if bad == "refuse":
            raise error
        left_out.append(LeftOut(path=path, reason=str(error), kind="bad"))

    try:
        for order, path in enumerate(paths):
            for place in list_checkpoints(path, order, left_out):
                if not window.admits(place.name):
                    left_out.append(LeftOut(path=place.path, reason="left out by --include or --exclude"))
                    continue
                try:
                    candidate = _open(place, key, left_out, allow_nonfinite=allow_nonfinite)
                except CkptavgError as error:
                    refuse(_with_hint(error, place), place.path)
                else:
                    opened += [candidate] if candidate else []
        kept = _without_copies(opened, left_out, refuse)
        ordered, warnings = _in_order(kept, refuse if bad == "list" else None)
        ordered, chosen = _with_readable_values(ordered, window, check, refuse)
        chosen_ids = {id(c) for c in chosen}
        outside = [c for c in ordered if id(c) not in chosen_ids]
        left_out += [LeftOut(path=c.path, reason="outside the window of steps") for c in outside]
    except BaseException:
        for one in opened:
            one.checkpoint.reader.close()
        raise
    for checkpoint in outside:
        checkpoint.reader.close()
    if not chosen and bad != "list":
        raise InputError(_nothing(left_out), path=", ".join(map(str, paths)), hint=_nothing_hint(paths))
    return Discovered(checkpoints=tuple(chosen), left_out=tuple(left_out), warnings=warnings)


def with_directory_changes(found: Discovered, paths: Sequence[Path], output: Path) -> Discovered:
    """Return ``found`` with a warning for each checkpoint that appeared or vanished since the directories were listed.

    Args:
        found: the result of `discover`.
        paths: the paths given to `discover`.
        output: the output's path, which gets no warning.
    """
    known = {c.path for c in found.checkpoints} | {one.path for one in found.left_out} | {output, output.parent}
    news = [
        f"{file.path} was deleted or renamed during the run; it was read to the end all the same"
        for checkpoint in found.checkpoints
        for file in checkpoint.reader.files
        if not os.path.lexists(file.path)
    ]
    for order, path in enumerate(paths):
        with suppress(InputError):  # the directory itself has gone
            new = (place.path for place in list_checkpoints(path, order, []) if place.path not in known)
            news += [f"{one} appeared during the run and is not one of its candidates" for one in new]
    return replace(found, warnings=(*found.warnings, *news))


@dataclass(frozen=True, kw_only=True)
class _Opened:
    checkpoint: Checkpoint
    steps: dict[str, int]
    place: CheckpointPath


def _open(place: CheckpointPath, key: str | None, left_out: list[LeftOut], *, allow_nonfinite: bool) -> _Opened | None:
    reader = open_reader(place.weights)
    try:
        if not place.explicit and "ckptavg" in reader.metadata:
            raise SkipFile("an earlier output of ckptavg", "warning")
        if key is None and (other := state_dict.other_contents(reader.tree)):
            raise SkipFile(other)
        chosen, tensors, notes = state_dict.model_tensors(reader, key)
        steps = steps_inside(reader)
        if place.path != place.weights and "global_step" not in steps:
            steps |= trainer_step(place.path / "trainer_state.json")
    except SkipFile as other:
        reader.close()
        if place.explicit:
            raise InputError(f"is {other}, not a model", path=place.path) from other
        left_out.append(LeftOut(path=place.path, reason=str(other), kind=other.kind))
        return None
    except BaseException:
        reader.close()
        raise
    named = step_in_name(place.name)
    checkpoint = Checkpoint(
        path=place.path,
        name=place.weights.name if place.path == place.weights else f"{place.name}/{place.weights.name}",
        step=0,
        step_from="",
        run=0 if place.explicit else place.order,
        format=reader.format,
        key=chosen,
        tensors=tensors,
        reader=reader,
        notes=(*notes, *reader.notes),
        allow_nonfinite=allow_nonfinite,
    )
    return _Opened(checkpoint=checkpoint, steps=steps | ({} if named is None else {"name": named}), place=place)


def _without_copies(opened: list[_Opened], left_out: list[LeftOut], refuse: _Refuse) -> list[_Opened]:
    """Drop copies of other checkpoints, keeping the one with a step in its name; refuse bad checkpoints."""
    preferred = sorted(opened, key=lambda o: ("name" not in o.steps, o.checkpoint.run, natural(o.checkpoint.name)))
    found, bad = duplicates.find([one.checkpoint for one in preferred])
    for i, error in bad.items():
        refuse(error, preferred[i].checkpoint.path)
        preferred[i].checkpoint.reader.close()
    for i, (original, how) in found.items():
        copy, other = preferred[i].checkpoint, preferred[original].checkpoint
        copy.reader.close()
        left_out.append(LeftOut(path=copy.path, reason=f"{how} {other.path}", kind="warning"))
    return [one for i, one in enumerate(preferred) if i not in found and i not in bad]


def _with_readable_values(
    ordered: list[Checkpoint], window: Window, check: Callable[[Checkpoint], None] | None, refuse: _Refuse
) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """Return ``ordered`` without the checkpoints found bad, and the window's selection from it, all of them checked."""
    checked: set[int] = set()
    while True:
        chosen = window.select(ordered)
        dropped: set[int] = set()
        for candidate in (c for c in chosen if check and id(c) not in checked):
            try:
                assert check is not None
                check(candidate)
            except CkptavgError as error:
                refuse(error, candidate.path)
                candidate.reader.close()
                dropped.add(id(candidate))
            checked.add(id(candidate))
        if not dropped:
            return ordered, chosen
        ordered = [c for c in ordered if id(c) not in dropped]


def _in_order(opened: list[_Opened], refuse: _Refuse | None) -> tuple[list[Checkpoint], tuple[str, ...]]:
    """Return the checkpoints in training order with steps of one kind, and warnings about the order.

    A checkpoint that has no kind of step in common with the others is passed to ``refuse``, or raised without it.
    """
    kind, distinct = common_kind([one.steps for one in opened], [one.checkpoint.run for one in opened])
    if kind is not None:
        stepped = [replace(one.checkpoint, step=one.steps[kind], step_from=kind) for one in opened]
        ordered = sorted(stepped, key=lambda c: (c.step, c.run, natural(c.name)))
        twice = next((b for a, b in pairwise(ordered) if (a.step, a.run) == (b.step, b.run)), None)
        doubt = (
            f"{twice.path}: step {twice.step} occurs more than once; are these raw and EMA weights?" if twice else ""
        )
        return ordered, (() if distinct else (doubt,))
    if all(one.place.explicit for one in opened) and not any(one.steps for one in opened):
        given = sorted(opened, key=lambda one: one.place.order)
        return [replace(one.checkpoint, step=i, step_from="order given") for i, one in enumerate(given, 1)], ()
    odd = min(opened, key=lambda one: len(one.steps))
    error = InputError(
        "has no training step of a kind that the other checkpoints have too, neither inside nor in its name",
        path=odd.checkpoint.path,
        hint=f"leave it out with {odd.checkpoint.excluding}, or name the checkpoints in their order",
    )
    if refuse is None:
        raise error
    refuse(error, odd.checkpoint.path)
    odd.checkpoint.reader.close()
    return _in_order([one for one in opened if one is not odd], refuse)


def _with_hint(error: CkptavgError, place: CheckpointPath) -> CkptavgError:
    if error.hint is None and not place.explicit:
        error.hint = f"leave it out with {excluding(place.name)}, or all bad ones with --skip-bad"
    return error


def _nothing(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "no checkpoints found: the directory is empty"
    shown = "; ".join(one.line for one in left_out[:3])
    return f"no checkpoints found; {len(left_out)} left out ({shown}{'; …' if len(left_out) > 3 else ''})"


def _nothing_hint(paths: Sequence[Path]) -> str:
    return f"`ckptavg inspect {paths[0]}` lists the files and why each was left out"
