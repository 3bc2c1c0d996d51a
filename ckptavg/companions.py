"""The files beside a model that a Hugging Face directory needs: config, tokenizer, processor."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import OutputError

PATTERNS: Final = (
    "config.json", "generation_config.json", "*_config.json", "preprocessor_config.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.jinja", "modules.json",
)  # fmt: skip


def check(folder: Path) -> None:
    """Refuse a directory that holds a sharded model, whose index some loaders would prefer to the new file.

    Raises:
        OutputError: naming the index.
    """
    for index in sorted(folder.glob("*.index.json")):
        raise OutputError(
            "belongs to a sharded model that loaders would mix with the new file",
            path=index,
            hint="choose an empty directory",
        )


@contextmanager
def made(folder: Path | None) -> Generator[None]:
    """``folder``, made if it does not exist, and unmade if what follows fails."""
    if folder is None or folder.is_dir():
        yield
        return
    try:
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror}", path=folder) from error
    try:
        yield
    except BaseException:
        folder.rmdir()
        raise


def copy(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy the companions of ``checkpoint`` into ``folder``; files that are already there stay.

    Returns:
        The names copied.
    Raises:
        OutputError: if one cannot be written.
    """
    source = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    copied: list[str] = []
    for path in sorted(source.iterdir()):
        wanted = path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in PATTERNS)
        if not wanted or (folder / path.name).exists():
            continue
        try:
            shutil.copyfile(path, folder / path.name)
        except OSError as error:
            raise OutputError(f"cannot copy {path.name} here: {error.strerror}", path=folder) from error
        copied.append(path.name)
    return copied
