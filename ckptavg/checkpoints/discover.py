"""Find checkpoints in directories, in training order, with a reason for every file that is left out."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeAlias

from ckptavg.checkpoints import duplicates, state_dict
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.listing import CheckpointPath, LeftOut, SkipFile, list_checkpoints
from ckptavg.checkpoints.steps import common_kind, natural, step_in_name, steps_inside, trainer_step
from ckptavg.checkpoints.window import Window
from ckptavg.errors import CkptavgError, InputError, excluding
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.readers import open_reader

_Refuse: TypeAlias = Callable[[CkptavgError, Path], None]


class NotFinite(NamedTuple):
    """A tensor with NaN or infinite values: the SHA-256 of its bytes, and the error unless all candidates share it."""

    digest: bytes
    has_nan: bool
    error: InputError


Check: TypeAlias = Callable[[Checkpoint], Mapping[str, NotFinite]]


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
    bad: Literal["refuse", "skip", "list"] = "refuse", check: Check | None = None,
    allow_nonfinite: bool = False,
) -> Discovered:  # fmt: skip
    """Find, open (headers only), order and filter the checkpoints that ``paths`` name.

    Args:
        paths: directories of checkpoints (several: several runs), or checkpoints themselves.
        window: filter on names, steps and counts.
        key: the sub-dictionary of each file that holds the model.
        bad: ``refuse`` raises for a bad checkpoint; ``skip`` leaves it out as if it did not exist; ``list`` does so too
            and accepts an empty result.
        check: raises InputError for a bad candidate, and returns its tensors that are not finite, which are bad unless
            they are equal in all candidates; called once for each one that the window selects.
        allow_nonfinite: accept NaN and infinite weights.
    Raises:
        InputError: if no checkpoint is found, or one is bad or has no training step.
    """
    window = window or Window()
    left_out: list[LeftOut] = []
    opened: list[_Opened] = []
    chosen: Sequence[Checkpoint] = ()

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
                    opened.append(
                        _Opened(checkpoint=open_checkpoint(place, key, allow_nonfinite=allow_nonfinite), place=place)
                    )
                except SkipFile as other:
                    left_out.append(LeftOut(path=place.path, reason=str(other), kind=other.kind))
                except CkptavgError as error:
                    if error.hint is None and not place.explicit:
                        error.hint = f"leave it out with {excluding(place.name)}, or all bad ones with --skip-bad"
                    refuse(error, place.path)
        ordered, warnings = _in_order(_without_copies(opened, left_out, refuse), refuse if bad == "list" else None)
        ordered, chosen = _with_readable_values(ordered, window, check or (lambda _: {}), refuse)
    finally:
        kept = {id(checkpoint.reader) for checkpoint in chosen}
        for reader in (candidate.checkpoint.reader for candidate in opened):
            if id(reader) not in kept:
                reader.close()
    outside = (checkpoint.path for checkpoint in ordered if id(checkpoint.reader) not in kept)
    left_out += [LeftOut(path=path, reason="outside the window of steps") for path in outside]
    if not chosen and bad != "list":
        shown = "; ".join(one.line for one in left_out[:3]) + ("; …" if len(left_out) > 3 else "")
        reason = f"; {len(left_out)} left out ({shown})" if left_out else ": the directory is empty"
        hint = f"`ckptavg inspect {paths[0]}` lists the files and why each was left out"
        raise InputError(f"no checkpoints found{reason}", path=", ".join(map(str, paths)), hint=hint)
    return Discovered(checkpoints=tuple(chosen), left_out=tuple(left_out), warnings=tuple(warnings))


def with_directory_changes(found: Discovered, paths: Sequence[Path], output: Path) -> Discovered:
    """Return ``found`` with a warning for each checkpoint in ``paths`` but ``output`` that came or went since."""
    known = {one.path for one in (*found.checkpoints, *found.left_out)} | {output, output.parent}
    files = (file.path for checkpoint in found.checkpoints for file in checkpoint.reader.files)
    gone = "was deleted or renamed during the run; it was read to the end all the same"
    news = [f"{path} {gone}" for path in files if not os.path.lexists(path)]
    for order, path in enumerate(paths):
        with suppress(InputError):  # the directory itself has gone
            new = (place.path for place in list_checkpoints(path, order, []) if place.path not in known)
            news += [f"{one} appeared during the run and is not one of its candidates" for one in new]
    return replace(found, warnings=(*found.warnings, *news))


@dataclass(frozen=True, kw_only=True)
class _Opened:
    checkpoint: Checkpoint
    place: CheckpointPath


def open_checkpoint(place: CheckpointPath, key: str | None, *, allow_nonfinite: bool = False) -> Checkpoint:
    """Open one checkpoint; its step is still to be chosen from `Checkpoint.steps`, for arguments see `discover`.

    Raises:
        InputError: if it is damaged or no model.
        SkipFile: if it is no model and its path was not given explicitly.
    """
    reader = open_reader(place.weights)
    try:
        if not place.explicit and "ckptavg" in reader.metadata:
            raise SkipFile("an earlier output of ckptavg", "warning")
        if key is None and (other := state_dict.other_contents(reader.tree)):
            raise SkipFile(other)
        chosen, tensors, notes = state_dict.model_tensors(reader, key)
        steps = steps_inside(reader)
        if is_folder(place.path) and "global_step" not in steps:
            steps |= trainer_step(place.path / "trainer_state.json")
    except BaseException as error:
        reader.close()
        if isinstance(error, SkipFile) and place.explicit:
            raise InputError(f"is {error}, not a model", path=place.path) from error
        raise
    named = step_in_name(place.name)
    return Checkpoint(
        path=place.path,
        name=place.weights.name or place.name if place.path == place.weights else f"{place.name}/{place.weights.name}",
        steps=steps | ({} if named is None else {"name": named}),
        run=0 if place.explicit else place.order, key=chosen, tensors=tensors, reader=reader,
        notes=(*notes, *reader.notes), allow_nonfinite=allow_nonfinite,
    )  # fmt: skip


def _without_copies(opened: list[_Opened], left_out: list[LeftOut], refuse: _Refuse) -> list[_Opened]:
    """Drop copies of other checkpoints, keeping the one with a step in its name; refuse bad checkpoints."""
    preferred = sorted(
        opened, key=lambda o: ("name" not in o.checkpoint.steps, o.checkpoint.run, natural(o.checkpoint.name))
    )
    copies, bad = duplicates.find([one.checkpoint for one in preferred])
    for i, error in bad.items():
        refuse(error, preferred[i].checkpoint.path)
    for i, (original, relation) in copies.items():
        reason = f"{relation} {preferred[original].checkpoint.path}"
        left_out.append(LeftOut(path=preferred[i].checkpoint.path, reason=reason, kind="warning"))
    return [one for i, one in enumerate(preferred) if i not in copies and i not in bad]


def _with_readable_values(
    ordered: list[Checkpoint], window: Window, check: Check, refuse: _Refuse
) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """Return ``ordered`` without the checkpoints found bad, and the window's selection from it, all of them checked."""
    checked: dict[int, Mapping[str, NotFinite]] = {}
    while True:
        chosen, bad = window.select(ordered), set[int]()
        for candidate in (c for c in chosen if id(c) not in checked):
            checked[id(candidate)] = {}
            try:
                checked[id(candidate)] = check(candidate)
            except CkptavgError as error:
                refuse(error, candidate.path)
                bad.add(id(candidate))
        for i, error in () if bad else _not_shared([checked[id(c)] for c in chosen]).items():
            refuse(error, chosen[i].path)
            bad.add(id(chosen[i]))
        if not bad:
            return ordered, chosen
        ordered = [c for c in ordered if id(c) not in bad]


def _not_shared(found: Sequence[Mapping[str, NotFinite]]) -> dict[int, InputError]:
    """Return the error of each checkpoint with a tensor that is not finite, but finite in others.

    If there is none, return those of checkpoints in which such a tensor differs from that of most others.
    """
    names = dict.fromkeys(name for tensors in found for name in tensors)
    shared = [name for name in names if all(name in tensors for tensors in found)]
    bad: dict[int, InputError] = {}
    for name in [name for name in names if name not in shared] or shared:
        ((usual, _),) = Counter(tensors[name].digest for tensors in found if name in tensors).most_common(1)
        for i, tensor in ((i, tensors[name]) for i, tensors in enumerate(found) if name in tensors):
            if name not in shared or tensor.digest != usual or (len(found) == 1 and tensor.has_nan):
                bad.setdefault(i, tensor.error)
    return bad


def _in_order(opened: list[_Opened], refuse: _Refuse | None) -> tuple[list[Checkpoint], Sequence[str]]:
    """Return the checkpoints in training order with steps of one kind, and warnings about the order.

    A checkpoint that has no kind of step in common with the others is passed to ``refuse``, or raised without it.
    """
    kind = common_kind([one.checkpoint.steps for one in opened], [one.checkpoint.run for one in opened])
    if kind is not None:
        stepped = [replace(one.checkpoint, step=one.checkpoint.steps[kind], step_from=kind) for one in opened]
        ordered = sorted(stepped, key=lambda c: (c.step, c.run, natural(c.name)))
        twice = [b for a, b in pairwise(ordered) if (a.step, a.run) == (b.step, b.run)][:1]
        doubt = "occurs more than once; are these raw and EMA weights?"
        return ordered, [f"{one.path}: step {one.step} {doubt}" for one in twice]
    if all(one.place.explicit for one in opened) and not any(one.checkpoint.steps for one in opened):
        given = sorted(opened, key=lambda one: one.place.order)
        return [replace(one.checkpoint, step=i, step_from="order given") for i, one in enumerate(given, 1)], ()
    odd = min(opened, key=lambda one: len(one.checkpoint.steps))
    what = "has no training step of a kind that the other checkpoints have too, neither inside nor in its name"
    hint = f"leave it out with {odd.checkpoint.excluding}, or name the checkpoints in their order"
    error = InputError(what, path=odd.checkpoint.path, hint=hint)
    if refuse is None:
        raise error
    refuse(error, odd.checkpoint.path)
    return _in_order([one for one in opened if one is not odd], refuse)
