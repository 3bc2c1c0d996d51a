"""Compute SHA-256 digests of open files from bytes that are read for other purposes."""

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

    Yields a function file → SHA-256; its first call reads the rest of all files, in ``threads`` threads.
    """
    stop = Event()
    hashes = {file: Hash(file, stop) for file in files if file.sha256 is None}

    def digest(file: RegularFile) -> str:
        if file.sha256 is None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(Hash.hexdigest, hashes.values()))
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
    return file.sha256 or Hash(file, stop).hexdigest()


class Hash:
    """Incremental SHA-256 of an open file, from bytes read by other code; reads the remaining bytes itself.

    `update` may be the file's listener. `hexdigest` stops reading as soon as ``stop`` is set.
    """

    def __init__(self, file: RegularFile, stop: Event | None = None) -> None:
        self._file = file
        self._stop = stop or Event()
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
        """Return the SHA-256 of the whole file and record it in ``file.sha256``; empty if ``stop`` was set."""
        with self._lock:
            self._read_to(self._file.size)
        if self._stop.is_set():
            return ""
        self._file.sha256 = self._sha256.hexdigest()
        return self._file.sha256

    def _read_to(self, offset: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK, max(0, offset - self._done))))
        while self._done < offset and not self._stop.is_set():
            part = buffer[: min(_CHUNK, offset - self._done)]
            self._file.fill(self._done, part)
            self._sha256.update(part)
            self._done += len(part)
