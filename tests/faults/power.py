"""A model of a disk that loses power: unflushed data may be there, or not, or in part, in any order.

Calls on ``os`` are executed and recorded. The first n records determine the states in which a disk may be found
afterwards: for a file, the flushed data and any of the pages written since; for a directory, the flushed names and any
subset of the later creations, renames and removals. Real file systems preserve more order than that.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PAGE = 256  # bytes; smaller than a real page, so that small files have several


class Recorder:
    """``os`` with a record of what changes the disk below a directory.

    Attributes:
        record: (call, target, arguments); files are numbered by inode, names are relative to the directory.
    """

    def __init__(self, folder: Path) -> None:
        self.record: list[tuple[str, Any, Any]] = []
        self._folder = folder
        self._numbers: dict[int, int] = {}
        self._folders: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        new = not os.path.lexists(path)
        fd = os.open(path, flags, mode)
        if flags & os.O_DIRECTORY:
            self._folders[fd] = self._name(path)
        else:
            self._numbers[fd] = os.fstat(fd).st_ino
            if new:
                self._add("name", self._name(path), self._numbers[fd])
        return fd

    def pwrite(self, fd: int, data: Any, position: int) -> int:
        done = os.pwrite(fd, data, position)
        self._add("write", self._numbers[fd], (position, bytes(data[:done])))
        return done

    def write(self, fd: int, data: Any) -> int:
        position = os.fstat(fd).st_size  # appends
        done = os.write(fd, data)
        self._add("write", self._numbers[fd], (position, bytes(data[:done])))
        return done

    def posix_fallocate(self, fd: int, start: int, size: int) -> None:
        os.posix_fallocate(fd, start, size)
        self._add("size", self._numbers[fd], start + size)

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)
        self._add("size", self._numbers[fd], size)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        self._add(*(("flush names", self._folders[fd]) if fd in self._folders else ("flush", self._numbers[fd])), None)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)
        self._add("flush", self._numbers[fd], None)

    def link(self, source: Any, target: Any) -> None:
        os.link(source, target)
        self._add("name", self._name(target), os.stat(target).st_ino)  # noqa: PTH116

    def replace(self, source: Any, target: Any) -> None:
        os.replace(source, target)  # noqa: PTH105
        self._add("move", self._name(target), (self._name(source), os.stat(target).st_ino))  # noqa: PTH116

    def unlink(self, path: Any) -> None:
        os.unlink(path)  # noqa: PTH108
        self._add("gone", self._name(path), None)

    def _name(self, path: Any) -> str:
        return str(Path(path).relative_to(self._folder))

    def _add(self, what: str, where: Any, more: Any) -> None:
        self.record.append((what, where, more))


@contextmanager
def recorded(folder: Path, *modules: Any) -> Generator[Recorder]:
    """Context manager that records the calls of ``modules`` on ``os`` below ``folder``."""
    recorder = Recorder(folder)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "os", recorder)
        yield recorder


def after(record: Iterable[tuple[str, Any, Any]], before: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """Draw a possible state of the disk, name → content.

    Args:
        record: the recorded calls.
        before: flushed content of the disk before them.
        rng: random generator that draws the state.
    """
    names: dict[str, int] = {name: -i for i, name in enumerate(before, 1)}
    known = {-i: data for i, data in enumerate(before.values(), 1)}
    since: dict[int, list[tuple[str, Any]]] = {}
    moved: list[Callable[[dict[str, int]], object]] = []
    for what, where, more in record:
        if what in ("write", "size"):
            since.setdefault(where, []).append((what, more))
        elif what == "flush":
            known[where] = _applied(known.get(where, b""), since.pop(where, []), None)
        elif what == "flush names":
            for change in moved:
                change(names)
            moved = []
        else:
            moved.append(_change(what, where, more))
    for change in moved:
        if rng.random() < 0.5:
            change(names)
    found = {number: _applied(known.get(number, b""), since.get(number, []), rng) for number in set(names.values())}
    return {name: found[number] for name, number in names.items()}


def _change(what: str, where: str, more: Any) -> Callable[[dict[str, int]], object]:
    def move(names: dict[str, int]) -> None:
        names.pop(more[0], None)
        names[where] = more[1]

    if what == "name":
        return lambda names: names.update({where: more})
    return move if what == "move" else lambda names: names.pop(where, None)


def _applied(content: bytes, changes: list[tuple[str, Any]], rng: random.Random | None) -> bytes:
    """Return the content after all changes, or after a random subset of their pages."""
    data = bytearray(content)
    for what, more in changes:
        if what == "size":
            if rng is None or rng.random() < 0.7:
                data = data[:more] + bytes(max(0, more - len(data)))
            continue
        position, written = more
        for start in range(0, len(written), PAGE):
            if rng is None or rng.random() < 0.5:
                page = written[start : start + PAGE]
                end = position + start + len(page)
                data += bytes(max(0, end - len(data)))
                data[position + start : end] = page
    return bytes(data)
