"""List the checkpoints of a directory by names and first bytes, with a reason for every other entry."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import closing, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from ckptavg.checkpoints import kinds, layouts, state_dict
from ckptavg.checkpoints.components import LeftOut, Step, chosen
from ckptavg.checkpoints.steps import natural, numbers
from ckptavg.checkpoints.tree_search import has_tensors
from ckptavg.checkpoints.window import Window
from ckptavg.errors import CkptavgError, InputError
from ckptavg.filesystem.regular_file import RegularFile, is_folder
from ckptavg.readers import (
    HEAD_SIZE,
    NotACheckpointError,
    claim,
    claim_folder,
    entries,
    foreign_kind,
    open_reader,
    suffixes,
)

_SHARD: Final = re.compile(r"-\d{5}-of-(?!0+1\.)\d{5}\.")  # 1 of 1 is not a shard
_RANK: Final = re.compile(r"(.*rank_?)(\d+)(\.pt)")  # Composer and verl write one file per rank
_OPENED: Final = 8  # files in a step's directory at most, to tell models from others by their contents
_DEPTH: Final = 2  # directories below a step's own in which its weights are looked for


@dataclass(frozen=True, kw_only=True)
class CheckpointPath:
    """Location of a checkpoint."""

    path: Path  # shown to the user: the file, or the directory that holds the model's files
    weights: Path  # the file to open
    name: str  # path of the weights from the directory that was given; it begins with that one's name if it is one step
    order: int  # index of the given path it was found under
    explicit: bool = False  # whether the user gave this path itself, rather than a directory that contains it
    globbed: bool = False  # whether it is one of several such paths in the order in which a shell expands a glob
    label: str = ""  # its name with as much of the directories in front as tells all apart
    folder: Path | None = None  # directory of its step, which may be above ``path``
    component: str = ""  # path below ``folder`` that its weights have in every step, such as ``unet``

    @property
    def entry(self) -> str:
        """Its name without the file in a directory, which globs match."""
        return self._entry(self.name)

    @property
    def below(self) -> str:
        """Path that globs match: below the directory that was given; of a path that was given itself, its label."""
        return self.label if self.explicit else self.name

    @property
    def whole_entry(self) -> str:
        """The same of its label."""
        return self._entry(self.label or self.name)

    def _entry(self, name: str) -> str:
        return name if self.path == self.weights else name.removesuffix(f"/{self.weights.name}")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The checkpoints under one path, and the library that writes such directories if it is known."""

    places: Sequence[CheckpointPath]
    library: str | None = None


class SkipFile(Exception):
    """Reason why an entry is not a candidate; ``kind`` as in `LeftOut`."""

    def __init__(self, reason: str, kind: str = "info") -> None:
        super().__init__(reason)
        self.kind = kind


def list_checkpoints(path: Path, order: int, left_out: list[LeftOut], window: Window) -> Listing:
    """Return the checkpoints under ``path``, a directory of checkpoints or a checkpoint, the ``order``-th given.

    Entries that are not checkpoints are appended to ``left_out``. Of a step with several models, ``window`` chooses.

    Raises:
        InputError: if steps have several models and none is chosen.
    """
    if not is_folder(path):
        folder = _folder_of(path)
        place = CheckpointPath(path=path, weights=path, name=path.name, order=order, explicit=True, folder=folder)
        return Listing(places=[place])
    names = entries(path)
    files, steps = ([], []) if claim_folder(names) else _scan(path, names, left_out)
    own = {"": path} if claim_folder(names) else _own_models(names, files, steps)
    if own:  # such as ./run/checkpoint-500
        steps, files = [Step(path, names, own)], []
    places = [
        CheckpointPath(path=file, weights=file, name=file.name, order=order, folder=_folder_of(file)) for file in files
    ]
    for step, models in chosen(path, steps, left_out, window, files=len(files)):
        start = Path(path.resolve().name if own else step.folder.name)
        for place, weights in models.items():
            places.append(
                CheckpointPath(
                    path=weights if weights == step.folder else weights.parent, weights=weights,
                    name=str(start / weights.relative_to(step.folder)), order=order, explicit=bool(own),
                    folder=step.folder, component=place,
                )
            )  # fmt: skip
    libraries = Counter(layouts.library(step.names) for step in steps)
    return Listing(places=places, library=libraries.most_common(1)[0][0] if libraries else None)


def _folder_of(file: Path) -> Path | None:
    """Return the directory whose side files belong to a file, because its name is the usual one in a directory."""
    return file.parent if file.name in layouts.WEIGHT_NAMES else None


def _own_models(names: Set[str], files: Sequence[Path], steps: Sequence[Step]) -> Mapping[str, Path]:
    """Return the weights of a directory that is one step itself, by their places; empty for a directory of steps.

    It has the usual names for weights and nothing else that could be weights, or what a job resumes from beside models
    whose places have no numbers.
    """
    resumable = layouts.has_training_state(names)
    if not steps and files and all(layouts.is_usual(file.name) for file in files) and (len(files) == 1 or resumable):
        return {"": files[0]} if len(files) == 1 else {file.name: file for file in files}
    if steps and not files and resumable and not any(numbers(step.folder.name) for step in steps):
        return {
            f"{step.folder.name}/{place}".rstrip("/"): file for step in steps for place, file in step.models.items()
        }
    return {}


def _scan(folder: Path, names: Set[str], left_out: list[LeftOut]) -> tuple[list[Path], list[Step]]:
    """Return the weight files and the directories with weights among the entries of ``folder``."""
    temporary = {name for name in names if any(fnmatchcase(name, pattern) for pattern in layouts.TEMPORARY)}
    shown = sorted((name for name in names if not name.startswith(".") or name in temporary), key=natural)
    files: list[Path] = []
    steps: list[Step] = []
    inside: dict[str, Set[str]] = {}
    for name in shown:
        with suppress(InputError):  # opening it raises the error
            if name not in temporary and name not in layouts.SIDE_FOLDERS and is_folder(folder / name):
                inside[name] = entries(folder / name)
    anywhere = frozenset[str]().union(*inside.values())
    for name in shown:
        path = folder / name
        try:
            if name in temporary:
                raise SkipFile("temporary: still being written, or abandoned", "warning")
            if name in layouts.SIDE_FOLDERS:
                raise SkipFile(layouts.SIDE_FOLDERS[name])
            if name in inside:
                steps.append(Step(path, inside[name], _models_of_step(path, inside[name], anywhere)))
            else:
                files.append(path if is_folder(path) else _weights_file(path))
        except SkipFile as other:
            left_out.append(LeftOut(path=path, reason=str(other), kind=other.kind))
        except InputError:
            files.append(path)  # unreadable: opening it raises the error, unless a filter leaves it out
    return files, steps


def _models_of_step(folder: Path, names: Set[str], anywhere: Set[str]) -> Mapping[str, Path]:
    reason = layouts.incomplete(folder.name, names, anywhere)
    models = dict(_models(folder, names, _DEPTH))
    if reason and (models or layouts.has_training_state(names) or not reason.endswith(".pkl")):
        raise SkipFile(f"incomplete: {reason}, which is written last", "warning")
    if models:
        return models
    if layouts.has_training_state(names):
        raise SkipFile("has no model weights", "warning")
    raise SkipFile("a directory without weights")


def _models(folder: Path, names: Set[str], depth: int) -> Iterator[tuple[str, Path]]:
    """Yield the place and the weights of each model in a directory; in those below it only if it has none itself."""
    if claim_folder(frozenset(names)):
        yield "", folder
        return
    if (parts := layouts.tensor_parallel(names)) > 1:
        raise SkipFile(layouts.TENSOR_PARALLEL.format(parts), "warning")
    usual = sorted(filter(layouts.is_usual, names), key=layouts.usual_order)
    if usual and usual[0] in layouts.WEIGHT_NAMES:
        files = [folder / usual[0], *(folder / name for name in usual if name not in layouts.WEIGHT_NAMES)]
    else:
        files = _weight_files(folder, names)
    if files:
        beside = dict(_ema_beside(folder, names)) if usual else {}
        several = len(files) + len(beside) > 1
        yield from ((file.name if several else "", file) for file in files)
        yield from beside.items()
        return
    for name in sorted(names, key=natural) if depth else ():
        skipped = name.startswith((".", "optim")) or name in layouts.SIDE_FOLDERS
        if not skipped and is_folder(folder / name):
            for place, file in _models(folder / name, entries(folder / name), depth - 1):
                yield f"{name}/{place}".rstrip("/"), file


def _ema_beside(folder: Path, names: Set[str]) -> Iterator[tuple[str, Path]]:
    """Yield the EMA weights that lie beside a model of the usual name, in a file or a directory."""
    for name in sorted(filter(kinds.is_ema, names)):
        if is_folder(folder / name):
            yield from ((name, file) for _, file in _models(folder / name, entries(folder / name), 0))
        elif name.endswith(suffixes()) and not name.endswith(".json") and not _SHARD.search(name):
            yield name, folder / name


def _weight_files(folder: Path, names: Set[str]) -> list[Path]:
    files: list[Path] = []
    refusal = None
    for name in sorted(names, key=natural):
        if name.endswith(suffixes()) and not is_folder(folder / name):
            try:
                files.append(_weights_file(folder / name))
            except SkipFile as other:
                refusal = other if other.kind == "warning" else refusal
    if refusal and not files:
        raise refusal
    return [file for file in files if _may_hold_model(file)] or files if 1 < len(files) <= _OPENED else files


def _may_hold_model(file: Path) -> bool:
    """Return whether a file has tensors that are not an optimizer's; a damaged one may have."""
    try:
        with RegularFile(file) as opened:
            if opened.size and claim(opened) is None:
                return False
        with closing(open_reader(file)) as reader:
            return state_dict.other_contents(reader.tree) is None and has_tensors(reader.tree)
    except NotACheckpointError:
        return False
    except CkptavgError:
        return True


def _weights_file(path: Path) -> Path:
    for pattern, reason in layouts.SIDE_FILES.items():
        if fnmatchcase(path.name, pattern):
            raise SkipFile(reason)
    if match := _RANK.fullmatch(path.name):
        stem, rank, suffix = match.groups()
        if int(rank):
            raise SkipFile(f"what process {rank} saved")
        if os.path.lexists(path.parent / f"{stem}1{suffix}"):
            raise SkipFile("one part of a model that several processes saved; gather it into one first", "warning")
    if path.name.endswith(suffixes()):
        if path.name.endswith(".json") or not _SHARD.search(path.name):
            return path
        index = _SHARD.sub(".", path.name) + ".index.json"
        if os.path.lexists(path.parent / index):
            raise SkipFile(f"a shard of {index}")
        raise SkipFile("a shard without its index", "warning")
    # an unusual name: the first bytes decide; JSON is excluded, because config.json looks like an index
    reason = None
    with suppress(InputError), RegularFile(path) as file:
        file_format = claim(file)
        if file_format and file_format.name != "sharded":
            return path
        reason = foreign_kind(file.read(0, min(HEAD_SIZE, file.size)))
    raise SkipFile(reason or "not a checkpoint")
