"""A directory becomes checkpoints in the order of training, and a reason for every other file in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Final, Self

from ckptavg import copies, layout
from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import CkptavgError, InputError, UsageError
from ckptavg.readers import RegularFile, claim, open_reader
from ckptavg.steps import common_kind, natural, step_in_name, steps_inside, trainer_step

WEIGHT_NAMES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".index.json")
SIDE_FILES: Final = {
    "optimizer*": "an optimizer's state",
    "optim.*": "an optimizer's state",
    "scheduler*": "a scheduler's state",
    "scaler*": "a gradient scaler's state",
    "rng_state*": "random number generators",
    "random_states_*": "random number generators",
    "training_args.bin": "the trainer's arguments",
    "*.tmp": "temporary",
    "*.part": "temporary",
    "*.incomplete": "temporary",
}
# the Trainer writes trainer_state.json last, so a directory with these and without it was interrupted
TRAINER_FILES: Final = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth")
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which of the checkpoints found are candidates; the filters apply in the order of these attributes.

    Attributes:
        include: only names that match this glob.
        exclude: not names that match this glob.
        start: from this training step on.
        stop: up to and including this training step.
        every: only every N-th, counted back from the last.
        last: only the last N.
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
        """Whether the globs let ``name`` (or its last part) through."""
        return (self.include is None or _matches(name, self.include)) and (
            self.exclude is None or not _matches(name, self.exclude)
        )

    def select(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """The checkpoints within the steps and counts, in the order given."""
        kept = [
            c
            for c in checkpoints
            if (self.start is None or c.step >= self.start) and (self.stop is None or c.step <= self.stop)
        ]
        kept = kept[:: -(self.every or 1)]
        return kept[: self.last][::-1]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file or directory that is no candidate, and why; ``kind`` is quiet, warning or bad."""

    path: Path
    reason: str
    kind: str = "quiet"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Open candidates in training order, and what was left out; a context manager that closes the files."""

    checkpoints: tuple[Checkpoint, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for checkpoint in self.checkpoints:
            checkpoint.reader.close()


def discover(
    paths: Sequence[Path], window: Window | None = None, key: str | None = None, *, keep_going: bool = False
) -> Found:
    """Find, open (headers only), order and filter the checkpoints that ``paths`` name.

    Args:
        paths: directories of checkpoints (several: several runs), or checkpoints themselves.
        window: which of them are wanted.
        key: the sub-dictionary of each that is the model.
        keep_going: list a bad file as left out instead of raising, as `ckptavg inspect` does.
    Raises:
        InputError: if there are none, one is bad, or one has no training step.
    """
    window = window or Window()
    left_out: list[LeftOut] = []
    opened: list[_Opened] = []
    try:
        for order, path in enumerate(paths):
            for place in _places(path, order, left_out):
                if not window.admits(place.name):
                    left_out.append(LeftOut(path=place.path, reason="left out by --include or --exclude"))
                    continue
                try:
                    one = _open(place, key, left_out)
                except CkptavgError as error:
                    if not keep_going:
                        raise _with_hint(error, place) from error
                    left_out.append(LeftOut(path=place.path, reason=str(error), kind="bad"))
                else:
                    opened += [one] if one else []
        kept = _without_copies(opened, left_out)
        ordered, warnings = _in_order(kept)
        chosen = window.select(ordered)
        wanted = {id(c) for c in chosen}
        outside = [c for c in ordered if id(c) not in wanted]
        left_out += [LeftOut(path=c.path, reason="outside the window of steps") for c in outside]
    except BaseException:
        for one in opened:
            one.checkpoint.reader.close()
        raise
    for checkpoint in outside:
        checkpoint.reader.close()
    if not chosen and not keep_going:
        raise InputError(_nothing(left_out), path=", ".join(map(str, paths)), hint=_nothing_hint(paths))
    return Found(checkpoints=tuple(chosen), left_out=tuple(left_out), warnings=warnings)


@dataclass(frozen=True, kw_only=True)
class _Place:
    path: Path  # what the user calls it
    weights: Path  # the file to open
    name: str
    order: int  # of the given path it comes from
    explicit: bool = False  # given itself, not found in a directory


@dataclass(frozen=True, kw_only=True)
class _Opened:
    checkpoint: Checkpoint
    steps: dict[str, int]
    place: _Place


def _places(path: Path, order: int, left_out: list[LeftOut]) -> Iterator[_Place]:
    """Where checkpoints lie under one of the given paths."""
    if not path.is_dir():
        yield _Place(path=path, weights=path, name=path.name, order=order, explicit=True)
        return
    places = list(_listed(path, order, left_out))
    if len(places) == 1 and places[0].path.parent == path and places[0].path.name in WEIGHT_NAMES:
        # the directory is itself one checkpoint, such as ./run/checkpoint-500
        name = path.resolve().name
        yield _Place(path=path, weights=places[0].weights, name=name, order=order, explicit=True)
    else:
        yield from places


def _listed(folder: Path, order: int, left_out: list[LeftOut]) -> Iterator[_Place]:
    try:
        entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: natural(e.name))
    except OSError as error:
        raise InputError(os.strerror(error.errno or 0).lower(), path=folder) from error
    # a Trainer's directory is incomplete without trainer_state.json
    trainer = any(e.name.startswith("checkpoint-") and (Path(e) / "trainer_state.json").exists() for e in entries)
    for entry in entries:
        path = folder / entry.name
        try:
            weights = _weights_in(path, trainer) if path.is_dir() else _weights_file(path)
        except _NotACheckpoint as other:
            left_out.append(LeftOut(path=path, reason=str(other), kind=other.kind))
        else:
            yield _Place(path=path, weights=weights, name=entry.name, order=order)


class _NotACheckpoint(Exception):
    def __init__(self, reason: str, kind: str = "quiet") -> None:
        super().__init__(reason)
        self.kind = kind


def _weights_file(path: Path) -> Path:
    for pattern, reason in SIDE_FILES.items():
        if fnmatchcase(path.name, pattern):
            raise _NotACheckpoint(reason, "warning" if reason == "temporary" else "quiet")
    if path.name.endswith(WEIGHT_SUFFIXES):
        if _SHARD.search(path.name) and not path.name.endswith(".json"):
            index = _SHARD.sub(".", path.name) + ".index.json"
            known = (path.parent / index).exists()
            raise _NotACheckpoint(
                f"a shard of {index}" if known else "a shard without its index", "quiet" if known else "warning"
            )
        return path
    # an unusual name: only the first bytes tell; JSON is not asked, for config.json would look like an index
    with suppress(InputError), RegularFile(path) as file:
        found = claim(file)
        if found and found.name != "sharded":
            return path
    raise _NotACheckpoint("not a checkpoint")


def _weights_in(folder: Path, trainer: bool) -> Path:
    names = {entry.name for entry in os.scandir(folder)}
    if folder.name.startswith(("tmp-", "tmp_")) or folder.name.endswith((".tmp", ".incomplete")):
        raise _NotACheckpoint("temporary: still being written, or abandoned", "warning")
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise _NotACheckpoint("a torch.distributed.checkpoint directory, which is not read", "warning")
    by_trainer = (trainer and re.fullmatch(r"checkpoint-\d+", folder.name)) or names & set(TRAINER_FILES)
    if by_trainer and "trainer_state.json" not in names:
        raise _NotACheckpoint("incomplete: it has no trainer_state.json, which is written last", "warning")
    for name in WEIGHT_NAMES:
        if name in names:
            return folder / name
    others: list[Path] = []
    for name in sorted(names):
        if name.endswith(WEIGHT_SUFFIXES):
            with suppress(_NotACheckpoint):
                others.append(_weights_file(folder / name))
    if len(others) == 1:
        return others[0]
    if by_trainer:
        raise _NotACheckpoint("has no model weights", "warning")
    raise _NotACheckpoint(f"a directory with {len(others)} weight files" if others else "a directory without weights")


def _open(place: _Place, key: str | None, left_out: list[LeftOut]) -> _Opened | None:
    reader = open_reader(place.weights)
    try:
        if not place.explicit and "ckptavg" in reader.metadata:
            raise _NotACheckpoint("an earlier output of ckptavg", "warning")
        if key is None and (other := layout.other_contents(reader.tree)):
            raise _NotACheckpoint(other)
        chosen, tensors, notes = layout.model_tensors(reader, key)
        steps = steps_inside(reader)
        if place.path != place.weights and "global_step" not in steps:
            steps |= trainer_step(place.path / "trainer_state.json")
    except _NotACheckpoint as other:
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
    )
    return _Opened(checkpoint=checkpoint, steps=steps | ({} if named is None else {"name": named}), place=place)


def _without_copies(opened: list[_Opened], left_out: list[LeftOut]) -> list[_Opened]:
    """Drop what is another's copy; of several, the one with a step in its name stays."""
    preferred = sorted(opened, key=lambda o: ("name" not in o.steps, o.checkpoint.run, natural(o.checkpoint.name)))
    found = copies.find([one.checkpoint for one in preferred])
    for i, (original, how) in found.items():
        copy, other = preferred[i].checkpoint, preferred[original].checkpoint
        copy.reader.close()
        left_out.append(LeftOut(path=copy.path, reason=f"{how} {other.path}", kind="warning"))
    return [one for i, one in enumerate(preferred) if i not in found]


def _in_order(opened: list[_Opened]) -> tuple[list[Checkpoint], tuple[str, ...]]:
    """The checkpoints with their steps, all of one kind, in training order; and what is doubtful about it."""
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
    fewest = min(opened, key=lambda one: len(one.steps)).checkpoint
    raise InputError(
        "tells no training step that the other checkpoints tell too, neither inside nor in its name",
        path=fewest.path,
        hint=f"leave it out with --exclude '{fewest.path.name}', or name the checkpoints in their order",
    )


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or any(fnmatchcase(part, glob) for part in Path(name).parts)


def _with_hint(error: CkptavgError, place: _Place) -> CkptavgError:
    if error.hint is None and not place.explicit:
        error.hint = f"leave it out with --exclude '{place.name}'"
    return error


def _nothing(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "no checkpoints found: the directory is empty"
    shown = "; ".join(f"{one.path.name}: {one.reason}" for one in left_out[:3])
    return f"no checkpoints found; {len(left_out)} left out ({shown}{'; …' if len(left_out) > 3 else ''})"


def _nothing_hint(paths: Sequence[Path]) -> str:
    return f"`ckptavg inspect {paths[0]}` lists what is there and why it was left out"
