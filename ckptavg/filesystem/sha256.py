"""SHA-256 digests of open files, computed from the bytes that are read anyway."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock
from typing import Final

from ckptavg.filesystem.regular_file import RegularFile

_CHUNK: Final = 1 << 20


def no_digest(_: RegularFile) -> str:
    """In place of a SHA-256 that nobody wants."""
    return ""


def placeholder_digest(_: RegularFile) -> str:
    """In place of a SHA-256 that is not known yet, as long as one."""
    return "0" * 64


@contextmanager
def hash_while_reading(files: Iterable[RegularFile], threads: int) -> Generator[Callable[[RegularFile], str]]:
    """Find the SHA-256 of open files from what is read of them within, so that no byte comes from the disk twice.

    Yields:
        The SHA-256 of one of ``files``; the first call reads what is left of all, ``threads`` at a time.
    """
    stop = Event()
    running = {file: Hash(file, stop) for file in files if file.sha256 is None}

    def digest(file: RegularFile) -> str:
        if file.sha256 is None:
            with ThreadPoolExecutor(threads) as pool:
                for one, found in zip(running, pool.map(Hash.hexdigest, running.values()), strict=True):
                    one.sha256 = found
        assert file.sha256 is not None
        return file.sha256

    for file, its in running.items():
        file.listener = its.saw
    try:
        yield digest
    finally:
        stop.set()
        for file in running:
            file.listener = None


def sha256(file: RegularFile, stop: Event | None = None) -> str:
    """The SHA-256 of an open file, in hexadecimal, found once; empty if ``stop`` was set meanwhile."""
    if file.sha256 is None:
        found = Hash(file, stop).hexdigest()
        if stop and stop.is_set():
            return ""
        file.sha256 = found
    return file.sha256


class Hash:
    """The SHA-256 of an open file, which takes what others read of it and reads what they do not, each byte once.

    Args:
        file: the file; `saw` may be its listener.
        stop: when set, `hexdigest` reads no further, and is of no use.
    """

    def __init__(self, file: RegularFile, stop: Event | None = None) -> None:
        self._file = file
        self._stop = stop
        self._sha256 = hashlib.sha256()
        self._done = 0
        self._lock = Lock()

    def saw(self, offset: int, data: memoryview) -> None:
        """Take bytes that were read; threads may come in any order, the sooner the cheaper."""
        with self._lock:
            if offset + len(data) > self._done:
                self._read_to(offset)
                self._sha256.update(data[self._done - offset :])
                self._done = offset + len(data)

    def hexdigest(self) -> str:
        """The SHA-256 of the whole file."""
        with self._lock:
            self._read_to(self._file.size)
        return self._sha256.hexdigest()

    def _read_to(self, offset: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK, max(0, offset - self._done))))
        while self._done < offset and not (self._stop and self._stop.is_set()):
            part = buffer[: min(_CHUNK, offset - self._done)]
            self._file.fill(self._done, part)
            self._sha256.update(part)
            self._done += len(part)
