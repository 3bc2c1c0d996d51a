"""Twelve changes that may happen to a checkpoint's file while it is being read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

_done: list[str] = []


def mutate(asked: str) -> None:
    """Apply ``MOMENT:NAME:PATH:OTHER``, once per process."""
    if asked not in _done:
        _done.append(asked)
        _, name, path, other = asked.split(":")
        {**MUTATIONS, **HARMLESS}[name](Path(path), Path(other))


def _grow(path: Path, other: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _shrink(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path, other: Path) -> None:
    os.truncate(path, 0)


def _at(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def _overwrite(path: Path, other: Path) -> None:
    """Overwrite one byte of the data."""
    position = path.stat().st_size * 3 // 4
    _at(path, position, bytes([path.read_bytes()[position] ^ 1]))


def _header(path: Path, other: Path) -> None:
    _at(path, 0, bytes(16))


def _zeros(path: Path, other: Path) -> None:
    size = path.stat().st_size
    _at(path, size // 2, bytes(size - size // 2))


def _rewrite(path: Path, other: Path) -> None:
    """Save over the file, as a training job does with its last checkpoint."""
    path.write_bytes(other.read_bytes())


def _replace(path: Path, other: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(other.read_bytes())
    new.replace(path)


def _swap(path: Path, other: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def _fifo(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _time_put_back(change: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def changed(path: Path, other: Path) -> None:
        before = path.stat()
        change(path, other)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return changed


MUTATIONS: Mapping[str, Callable[[Path, Path], None]] = {
    "grow": _grow,
    "shrink": _shrink,
    "empty": _empty,
    "overwrite": _overwrite,
    "overwrite, time put back": _time_put_back(_overwrite),
    "header": _header,
    "zeros": _zeros,
    "rewrite": _rewrite,
    "replace": _replace,
    "replace, time put back": _time_put_back(_replace),
    "swap": _swap,
    "fifo": _fifo,
}


def _delete(path: Path, other: Path) -> None:
    path.unlink()


def _appear(path: Path, other: Path) -> None:
    """Add another checkpoint."""
    path.with_name(f"step-99{path.suffix}").write_bytes(path.read_bytes())


HARMLESS: Mapping[str, Callable[[Path, Path], None]] = {"delete": _delete, "appear": _appear}
