"""What must be the same for a journal to be of the same run."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ckptavg.checkpoints import duplicates
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.filesystem.regular_file import is_file


def fingerprint(
    checkpoints: Sequence[Checkpoint],
    settings: Mapping[str, Any],
    task: str | None,
    data: Sequence[Path | str | None],
) -> dict[str, Any]:
    """The first line of a journal; what of it differs is named.

    Args:
        checkpoints: the candidates; by step, size and a digest of their names, shapes and samples, which is known at
            once. The rest of their bytes is `ckptavg.journal.source_digests`' matter.
        settings: of the strategy and of the run.
        task: the task's file or module, imported; it and what it has imported from its own directory count by content.
        data: files of data by content, directories by the names, sizes and times of what is in them.
    """
    candidates = {
        f"{i} {c.name}": [c.step, c.size, duplicates.digest(c).hex()[:16]] for i, c in enumerate(checkpoints, 1)
    }
    return {
        "candidates": candidates,
        "torch": torch.__version__,
        **{name: _as_json(value) for name, value in settings.items()},
        "task": {} if task is None else _code_digests(task),
        "data": {str(path): _data_digest(Path(path)) for path in data if path is not None},
    }


def _as_json(value: Any) -> Any:
    """As JSON has it, so that a difference is found where it is."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return {str(place): _as_json(inner) for place, inner in enumerate(value, 1)}
    return value if isinstance(value, str) else repr(value)


def _code_digests(source: str) -> dict[str, str]:
    path = Path(source)
    if not is_file(path):
        module = sys.modules.get(source)
        path = Path(getattr(module, "__file__", None) or source)
    path = path.resolve()
    folder = f"{path.parent}{os.sep}".replace(2 * os.sep, os.sep)  # a task may lie in the root
    files = {path} | {Path(found) for found in _modules() if found.startswith(folder)}
    own = (one for one in files if "site-packages" not in one.relative_to(path.parent).parts and is_file(one))
    return {str(one.relative_to(path.parent)): _sha256(one) for one in sorted(own)}


def _modules() -> set[str]:
    """The real paths of all modules' files; there are thousands, in few directories, so these are followed once."""
    real = cache(os.path.realpath)
    found: set[str] = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).is_absolute():
            folder, name = os.path.split(file)
            path = f"{real(folder)}{os.sep}{name}"
            found.add(os.path.realpath(path) if os.path.islink(path) else path)  # noqa: PTH114  # Path is slow
    return found


def _data_digest(path: Path) -> str:
    if is_file(path):
        return _sha256(path)
    digest = hashlib.sha256(str(path).encode("utf-8", "surrogateescape"))
    for one in sorted(path.rglob("*")):
        status = one.lstat()  # a link may lead nowhere
        digest.update(repr((str(one.relative_to(path)), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # whoever needs it says why it cannot be read
        return "unreadable"
