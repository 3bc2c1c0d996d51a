"""List the checkpoints of a directory by names and first bytes, with a reason for every other entry."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from ckptavg.checkpoints.steps import natural
from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile, is_folder
from ckptavg.readers import HEAD_SIZE, claim, claim_folder, entries, foreign_kind, suffixes

WEIGHT_NAMES: Final = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
SIDE_FILES: Final = {
    "optimizer*": "an optimizer's state",
    "optim.*": "an optimizer's state",
    "scheduler*": "a scheduler's state",
    "scaler*": "a gradient scaler's state",
    "rng_state*": "random number generators",
    "random_states_*": "random number generators",
    "training_args.bin": "the trainer's arguments",
    "SHA256SUMS": "what the checkpoints' sums must be",
}
SIDE_FOLDERS: Final = {"recipe_state": "a recipe's state", "lost+found": "the file system's own"}  # first: torchtune
# patterns of unfinished files, of a job that is running or has died
TEMPORARY: Final = ("tmp-*", "tmp_*", "*.tmp", ".tmp*", "*.part", "*.incomplete", "*.ckptavg-tmp")
# the Trainer writes trainer_state.json last, so a directory with these and without it was interrupted
TRAINER_FILES: Final = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth")
_SHARD: Final = re.compile(r"-\d{5}-of-(?!0+1\.)\d{5}\.")  # 1 of 1 is not a shard
_RANK: Final = re.compile(r"(.*rank)(\d+)(\.pt)")  # Composer writes one file per rank


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file or directory that is not a candidate, and the reason; ``kind`` is info, warning or bad."""

    path: Path
    reason: str
    kind: str = "info"

    @property
    def line(self) -> str:
        """Path and reason; the reason of a bad file is an error message that starts with the path."""
        return self.reason if self.kind == "bad" else f"{self.path}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class CheckpointPath:
    """Location of a checkpoint."""

    path: Path  # shown to the user: the file, or the directory that holds the model's files
    weights: Path  # the file to open
    name: str  # the last component of ``path``
    order: int  # index of the given path it was found under
    explicit: bool = False  # whether the user gave this path itself, rather than a directory that contains it


def list_checkpoints(path: Path, order: int, left_out: list[LeftOut]) -> Sequence[CheckpointPath]:
    """Return the checkpoints under ``path``, a directory of checkpoints or a checkpoint, the ``order``-th given.

    Entries that are not checkpoints are appended to ``left_out``.
    """
    if not is_folder(path):
        return [CheckpointPath(path=path, weights=path, name=path.name, order=order, explicit=True)]
    names = entries(path)
    weights = path if claim_folder(names) else None
    places = [] if weights else list(_listed(path, names, order, left_out))
    if len(places) == 1 and places[0].path.parent == path and places[0].path.name in WEIGHT_NAMES:
        weights = places[0].weights
    if weights:  # the directory is itself one checkpoint, such as ./run/checkpoint-500
        return [CheckpointPath(path=path, weights=weights, name=path.resolve().name, order=order, explicit=True)]
    return places


def _listed(folder: Path, inside: frozenset[str], order: int, left_out: list[LeftOut]) -> Iterator[CheckpointPath]:
    temporary = {name for name in inside if any(fnmatchcase(name, pattern) for pattern in TEMPORARY)}
    names = sorted((name for name in inside if not name.startswith(".") or name in temporary), key=natural)
    # a Trainer's directory is incomplete without trainer_state.json
    states = (folder / name / "trainer_state.json" for name in names if name.startswith("checkpoint-"))
    trainer = any(map(os.path.lexists, states))
    for name in names:
        path = folder / name
        try:
            if name in temporary:
                raise SkipFile("temporary: still being written, or abandoned", "warning")
            weights = _weights_in(path, trainer) if is_folder(path) else _weights_file(path)
        except SkipFile as other:
            left_out.append(LeftOut(path=path, reason=str(other), kind=other.kind))
            continue
        except InputError:
            weights = path  # unreadable: opening it raises the error, unless a filter leaves it out
        yield CheckpointPath(path=path, weights=weights, name=name, order=order)


class SkipFile(Exception):
    """Reason why an entry is not a candidate; ``kind`` as in `LeftOut`."""

    def __init__(self, reason: str, kind: str = "info") -> None:
        super().__init__(reason)
        self.kind = kind


def _weights_file(path: Path) -> Path:
    for pattern, reason in SIDE_FILES.items():
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


def _weights_in(folder: Path, trainer: bool) -> Path:
    if folder.name in SIDE_FOLDERS:
        raise SkipFile(SIDE_FOLDERS[folder.name])
    names = entries(folder)
    if any(name.endswith(".distcp") for name in names) and not any(name.endswith(".metadata") for name in names):
        raise SkipFile("incomplete: it has no .metadata, which is written last", "warning")
    if claim_folder(names):
        return folder
    by_trainer = (trainer and re.fullmatch(r"checkpoint-\d+", folder.name)) or names & set(TRAINER_FILES)
    if by_trainer and "trainer_state.json" not in names:
        raise SkipFile("incomplete: it has no trainer_state.json, which is written last", "warning")
    if usual := next((name for name in WEIGHT_NAMES if name in names), None):
        return folder / usual
    others = list(_models_in(folder, names))
    if len(others) == 1:
        return others[0]
    if by_trainer:
        raise SkipFile("has no model weights", "warning")
    raise SkipFile(f"a directory with {len(others)} weight files" if others else "a directory without weights")


def _models_in(folder: Path, names: frozenset[str]) -> Iterator[Path]:
    """Yield weight files, and subdirectories that hold a model, such as ``pytorch_model_fsdp_0``."""
    for name in sorted(names):
        path = folder / name
        if is_folder(path):
            if not name.startswith("optim") and claim_folder(entries(path)):
                yield path
        elif name.endswith(suffixes()):
            with suppress(SkipFile):
                yield _weights_file(path)
