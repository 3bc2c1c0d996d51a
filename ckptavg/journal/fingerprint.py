"""Fingerprint of a run: a journal can be resumed only if its fingerprint is equal."""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ckptavg.checkpoints import duplicates
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.filesystem.regular_file import is_file
from ckptavg.runtime import version


def fingerprint(
    checkpoints: Sequence[Checkpoint],
    settings: Mapping[str, Any],
    task: str | None,
    data: Mapping[str, Path | str | None],
) -> dict[str, Any]:
    """Return the first line of a journal; errors name the entries in which two of them differ.

    Args:
        checkpoints: the candidates, none if `candidate_name` tells them apart; identified by step, size and a digest of
            their names, shapes and samples, which is fast to compute. `ckptavg.journal.source_digests` compares their
            full content.
        settings: settings of the strategy and of the run.
        task: the task's file or module, imported; it and its imports from its own directory are hashed.
        data: option → path of its data. Files are hashed; directories are identified by the names, sizes and times of
            their files.
    """
    candidates = {
        f"{i} {c.name}": [c.step, c.size, duplicates.digest(c).hex()[:16]] for i, c in enumerate(checkpoints, 1)
    }
    return {
        "candidates": candidates,
        "torch": version.installed("torch"),
        **{name: _as_json(value) for name, value in settings.items()},
        "task": {} if task is None else _code_digests(task),
        "data": {name: {str(path): _data_digest(Path(path))} for name, path in data.items() if path is not None},
    }


def candidate_name(checkpoint: Checkpoint) -> str:
    """Return the name of a candidate in a journal to which others are added: equal only for an unchanged one.

    It is a digest of name, step and samples of the tensors, and of each file's inode, size and modification time.
    """
    files = [file.identity[:3] for file in checkpoint.reader.files]
    kept = sorted(checkpoint.kept)
    text = repr((checkpoint.name, checkpoint.step, checkpoint.key, kept, files, duplicates.digest(checkpoint)))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _as_json(value: Any) -> Any:
    """Convert to nested dicts of strings, so that differences can be located."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return {str(index): _as_json(inner) for index, inner in enumerate(value, 1)}
    return value if isinstance(value, str) else repr(value)


def _code_digests(source: str) -> dict[str, str]:
    path = Path(source)
    if not is_file(path):
        module = sys.modules.get(source)
        path = Path(getattr(module, "__file__", None) or source)
    path = path.resolve()
    folder = f"{path.parent}{os.sep}".replace(2 * os.sep, os.sep)  # the task may be in the root directory
    files = {path} | {Path(module) for module in _module_paths() if module.startswith(folder)}
    own = (file for file in files if "site-packages" not in file.relative_to(path.parent).parts and is_file(file))
    return {str(file.relative_to(path.parent)): _sha256(file) for file in sorted(own)}


def _module_paths() -> set[str]:
    """Return the real paths of all imported modules; each directory, shared by many of them, is resolved once."""
    real = cache(os.path.realpath)
    paths: set[str] = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and os.path.isabs(file):  # noqa: PTH117  # Path is slow
            folder, name = os.path.split(file)
            path = f"{real(folder)}{os.sep}{name}"
            paths.add(os.path.realpath(path) if os.path.islink(path) else path)  # noqa: PTH114
    return paths


def _data_digest(path: Path) -> str:
    if is_file(path):
        return _sha256(path)
    digest = hashlib.sha256(str(path).encode("utf-8", "surrogateescape"))
    for entry in sorted(path.rglob("*")):
        status = entry.lstat()  # links may be dangling
        digest.update(repr((str(entry.relative_to(path)), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # code that reads the file raises its own error
        return "unreadable"
