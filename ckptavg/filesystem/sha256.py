"""Compute SHA-256 digests of open files from bytes that are read for other purposes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock
from typing import Final

from ckptavg.filesystem.regular_file import RegularFile

_CHUNK: Final = 1 << 20


@contextmanager
def hash_while_reading(files: Iterable[RegularFile], threads: int) -> Generator[Callable[[RegularFile], str]]:
    """Hash open files while the body reads them, so that no byte is read from disk twice.

    Yields:
        A function file → SHA-256; its first call reads the rest of all files, in ``threads`` threads.
    """
    stop = Event()
    hashes = {file: Hash(file, stop) for file in files if file.sha256 is None}

    def digest(file: RegularFile) -> str:
        if file.sha256 is None:
            with ThreadPoolExecutor(threads) as pool:
                for unhashed, hexdigest in zip(hashes, pool.map(Hash.hexdigest, hashes.values()), strict=True):
                    unhashed.sha256 = hexdigest
        assert file.sha256 is not None
        return file.sha256

    for file, partial_hash in hashes.items():
        file.listener = partial_hash.update
    try:
        yield digest
    finally:
        stop.set()
        for file in hashes:
            file.listener = None


def sha256(file: RegularFile, stop: Event | None = None) -> str:
    """Return the SHA-256 of an open file in hexadecimal, computed once; empty if ``stop`` was set in the meantime."""
    if file.sha256 is None:
        hexdigest = Hash(file, stop).hexdigest()
        if stop and stop.is_set():
            return ""
        file.sha256 = hexdigest
    return file.sha256


class Hash:
    """Incremental SHA-256 of an open file, from bytes read by other code; reads the remaining bytes itself.

    Args:
        file: the file; `update` may be its listener.
        stop: if set, `hexdigest` stops reading and its result is invalid.
    """

    def __init__(self, file: RegularFile, stop: Event | None = None) -> None:
        self._file = file
        self._stop = stop
        self._sha256 = hashlib.sha256()
        self._done = 0
        self._lock = Lock()

    def update(self, offset: int, data: memoryview) -> None:
        """Add bytes read at ``offset``; calls may come from any thread, in any order (file order avoids rereading)."""
        with self._lock:
            if offset + len(data) > self._done:
                self._read_to(offset)
                self._sha256.update(data[self._done - offset :])
                self._done = offset + len(data)

    def hexdigest(self) -> str:
        """Return the SHA-256 of the whole file."""
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
