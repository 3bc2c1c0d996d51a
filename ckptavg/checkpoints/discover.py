"""Find checkpoints in directories, in training order, with a reason for every file that is left out."""

import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self, TypeAlias

from ckptavg.checkpoints import duplicates, kinds, state_dict
from ckptavg.checkpoints.checkpoint import Checkpoint, shortest_names
from ckptavg.checkpoints.components import LeftOut
from ckptavg.checkpoints.listing import CheckpointPath, Listing, SkipFile, list_checkpoints
from ckptavg.checkpoints.name_steps import Opened
from ckptavg.checkpoints.order import in_order
from ckptavg.checkpoints.steps import natural, numbers, steps_beside, steps_in_name, steps_inside
from ckptavg.checkpoints.window import Window, emptied
from ckptavg.errors import CkptavgError, InputError, counted, excluding
from ckptavg.readers import NotACheckpointError, open_reader, suffixes

_Refuse: TypeAlias = Callable[[CkptavgError, Path], None]
OWN_OUTPUT: Final = "an earlier output of ckptavg"
_TYPED: Final = 2  # paths in the order of their text that somebody may have typed


class NothingFoundError(InputError):
    """No checkpoint, or none that is not left out."""


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
    component: str | None = None  # the model of each step that was chosen
    layout: str = ""  # a description of the directories, such as ``Accelerate save_state, 12 steps, component unet``

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
    opened: list[Opened] = []
    chosen: Sequence[Checkpoint] = ()

    def refuse(error: CkptavgError, path: Path) -> None:
        if bad == "refuse":
            raise error
        left_out.append(LeftOut(path=path, reason=str(error), kind="bad", hint=error.hint))

    try:
        listings = [list_checkpoints(path, order, left_out, window) for order, path in enumerate(paths)]
        places = _told_apart([place for listing in listings for place in listing.places])
        admitted = [window.admits(place.below, place.whole_entry) for place in places]
        excluded = [place.folder or place.path for place, is_in in zip(places, admitted, strict=True) if not is_in]
        left_out += [LeftOut(path=path, reason="left out by --include or --exclude") for path in excluded]
        wanted = _with_asides([place for place, is_in in zip(places, admitted, strict=True) if is_in])
        for i, (place, aside) in enumerate(wanted):
            try:
                checkpoint = open_checkpoint(place, key, allow_nonfinite=allow_nonfinite)
                opened.append(Opened(checkpoint=checkpoint, place=place, aside=aside))
            except SkipFile as other:
                left_out.append(LeftOut(path=place.path, reason=str(other), kind=other.kind))
            except CkptavgError as error:
                others = bad == "refuse" and error.hint is None and not place.explicit
                if others and (opened or any(_opens(other, key) for other, _ in wanted[i + 1 :])):
                    error.hint = f"leave it out with {excluding(place.whole_entry)}, or all bad ones with --skip-bad"
                if not aside:
                    refuse(error, place.path)
        candidates, warnings = in_order(
            _without_copies(opened, left_out, refuse), window.step_from, refuse if bad == "list" else None
        )
        candidates = _with_runs(candidates, opened)
        ordered, chosen = _with_readable_values(candidates, window, check or (lambda _: {}), refuse)
    finally:
        kept = {id(checkpoint.reader) for checkpoint in chosen}
        for reader in (candidate.checkpoint.reader for candidate in opened):
            if id(reader) not in kept:
                reader.close()
    left_out += [
        LeftOut(path=one.path, reason="outside the window of steps") for one in ordered if id(one.reader) not in kept
    ]
    if not chosen and bad != "list":
        raise _nothing(paths, left_out)
    folders = {one.checkpoint.path: paths[one.place.order] for one in opened if not one.place.explicit}
    return Discovered(
        checkpoints=tuple(chosen), left_out=tuple(left_out),
        warnings=(*warnings, *emptied(folders, ordered, chosen)),
        component=window.component, layout=_layout(listings, chosen, opened),
    )  # fmt: skip


def _opens(place: CheckpointPath, key: str | None) -> bool:
    with suppress(CkptavgError, SkipFile):
        open_checkpoint(place, key).reader.close()
        return True
    return False


def _told_apart(places: Sequence[CheckpointPath]) -> list[CheckpointPath]:
    """Return the places with their labels, and whether they were named by a glob.

    A shell expands a glob in the order of its text, which is taken for one if three paths or more are in it.
    """
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = shortest_names([place.weights for place in places], [name.count("/") + 1 for name in names])
    given = [str(place.weights) for place in places]
    globbed = len(given) > _TYPED and all(place.explicit for place in places) and given == sorted(given)
    return [replace(place, label=label, globbed=globbed) for place, label in zip(places, names, strict=True)]


def _nothing(paths: Sequence[Path], left_out: Sequence[LeftOut]) -> NothingFoundError:
    shown = "; ".join(one.line for one in left_out[:3]) + ("; …" if len(left_out) > 3 else "")
    reason = f"; {len(left_out)} left out ({shown})" if left_out else ": the directory is empty"
    hint = f"`ckptavg inspect {shlex.quote(str(paths[0]))}` lists the files and why each was left out"
    return NothingFoundError(f"no checkpoints found{reason}", path=", ".join(map(str, paths)), hint=hint)


def _with_asides(places: Sequence[CheckpointPath]) -> list[tuple[CheckpointPath, str]]:
    """Return the places, each with the reason why its name says that it is no candidate, or ``""``."""
    found = [i for i, place in enumerate(places) if place.globbed or not place.explicit]
    reasons = kinds.asides([places[i].entry for i in found])
    by_place = {found[j]: reason for j, reason in reasons.items()}
    return [(place, by_place.get(i, "")) for i, place in enumerate(places)]


def _layout(listings: Sequence[Listing], chosen: Sequence[Checkpoint], opened: Sequence[Opened]) -> str:
    """Describe the directories: the library that writes them, the number of steps, and where their weights are."""
    library = next((listing.library for listing in listings if listing.library), None)
    components = {one.place.component for one in opened if one.checkpoint.path in {c.path for c in chosen}}
    steps = counted(len(chosen), "step")
    formats = ", ".join(dict.fromkeys(checkpoint.reader.format for checkpoint in chosen))
    component = components.pop() if len(components) == 1 else ""
    return ", ".join(filter(None, (library or formats, steps, component and f"component {component}")))


def with_directory_changes(found: Discovered, paths: Sequence[Path], output: Path) -> Discovered:
    """Return ``found`` with a warning for each checkpoint in ``paths`` but ``output`` that came or went since."""
    known = {one.path for one in (*found.checkpoints, *found.left_out)} | {output, output.parent}
    files = (file.path for checkpoint in found.checkpoints for file in checkpoint.reader.files)
    gone = "was deleted or renamed during the run; it was read to the end all the same"
    news = [f"{path} {gone}" for path in files if not os.path.lexists(path)]
    for order, path in enumerate(paths):
        with suppress(InputError):  # the directory itself has gone
            places = list_checkpoints(path, order, [], Window(component=found.component)).places
            new = (place.path for place in places if place.path not in known)
            news += [f"{one} appeared during the run and is not one of its candidates" for one in new]
    return replace(found, warnings=(*found.warnings, *news))


def open_checkpoint(place: CheckpointPath, key: str | None, *, allow_nonfinite: bool = False) -> Checkpoint:
    """Open one checkpoint; its step is still to be chosen from `Checkpoint.steps`, for arguments see `discover`.

    Raises:
        InputError: if it is damaged or no model.
        SkipFile: if it is no model and its path was not given explicitly.
    """
    try:
        reader = open_reader(place.weights)
    except NotACheckpointError as error:
        if place.explicit or place.weights.name.endswith(suffixes()):
            raise
        raise SkipFile(error.reason) from error
    try:
        if (place.globbed or not place.explicit) and "ckptavg" in reader.metadata:
            raise SkipFile(OWN_OUTPUT, "warning")
        if key is None and (other := state_dict.other_contents(reader.tree)):
            raise SkipFile(other)
        chosen, tensors, notes = state_dict.model_tensors(reader, key)
        steps = steps_inside(reader)
        for folder in (place.folder, place.path if place.path != place.weights else None):
            steps |= {} if folder is None or "global_step" in steps else steps_beside(folder)
    except BaseException as error:
        reader.close()
        if isinstance(error, SkipFile) and place.explicit and not place.globbed:
            raise InputError(f"is {error}, not a model", path=place.path) from error
        raise
    return Checkpoint(
        path=place.path, name=place.label or place.name, steps=steps | steps_in_name(place.label or place.name),
        run=0 if place.explicit else place.order, key=chosen, tensors=tensors, reader=reader,
        notes=(*notes, *reader.notes), allow_nonfinite=allow_nonfinite,
    )  # fmt: skip


def _without_copies(opened: list[Opened], left_out: list[LeftOut], refuse: _Refuse) -> list[Opened]:
    """Drop copies of other checkpoints, keeping the one with a number in its name, and what is set aside.

    A copy of a checkpoint that is set aside is set aside too; bad checkpoints are refused.
    """
    preferred = sorted(
        opened,
        key=lambda o: (2 * (not numbers(o.place.name)), bool(o.aside), o.checkpoint.run, natural(o.checkpoint.name)),
    )
    copies, bad = duplicates.find([one.checkpoint for one in preferred])
    for i, error in bad.items():
        refuse(error, preferred[i].checkpoint.path)
    for i, one in enumerate(preferred):
        reason = one.aside
        if i in copies:
            original, relation = copies[i]
            reason = f"{relation} {preferred[original].checkpoint.path}"
            reason += f", {preferred[original].aside}" if preferred[original].aside else ""
        if reason:
            left_out.append(LeftOut(path=one.checkpoint.path, reason=reason, kind="warning"))
    return [one for i, one in enumerate(preferred) if not one.aside and i not in copies and i not in bad]


def _with_runs(candidates: Sequence[Checkpoint], opened: Sequence[Opened]) -> list[Checkpoint]:
    """Return the candidates with their runs: directories that were given, or that hold checkpoints that were.

    Runs of one checkpoint each are one run.
    """
    homes = {
        one.checkpoint.reader: (one.place.folder or one.place.path).absolute().parent
        if one.place.explicit
        else one.place.order
        for one in sorted(opened, key=lambda one: one.place.order)
    }
    numbers = {home: i for i, home in enumerate(dict.fromkeys(homes.values()))}
    runs = [numbers[homes[candidate.reader]] for candidate in candidates]
    several = len(set(runs)) < len(runs)
    return [replace(c, run=run if several else 0) for c, run in zip(candidates, runs, strict=True)]


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
