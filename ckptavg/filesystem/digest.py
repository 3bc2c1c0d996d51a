"""Compute digests of open files, from bytes that are read for other purposes where there are such.

A digest is one text, the algorithm and 64 hexadecimal digits: ``blake3:af13…``. Both algorithms are cryptographic:
nobody can make other bytes of the same digest. BLAKE3 is several times as fast, and ``b3sum`` prints the same digits;
SHA-256 is what model hubs and ``sha256sum`` use.
"""

import hashlib
import re
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock
from typing import Any, Final, Literal, Protocol, TypeAlias

from blake3 import blake3

from ckptavg.filesystem.regular_file import RegularFile

Algorithm: TypeAlias = Literal["blake3", "sha256"]
NAMES: Final[Mapping[str, str]] = {"blake3": "BLAKE3", "sha256": "SHA-256"}
"""The algorithms, and their names in text."""
PLACEHOLDER: Final = f"blake3:{'0' * 64}"
"""A text as long as any digest."""
_CHUNK: Final = 1 << 20
_DIGEST: Final = re.compile(rf"({'|'.join(NAMES)}):[0-9a-f]{{64}}")


class Hasher(Protocol):
    """A digest under construction, as those of hashlib are."""

    def update(self, data: memoryview | bytes, /) -> Any:
        """Add bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far in hexadecimal."""
        ...


def hasher(algorithm: Algorithm, threads: int = 1) -> Hasher:
    """Return a new hasher; BLAKE3 divides each long update among up to ``threads``, which changes no digest."""
    return blake3(max_threads=threads) if algorithm == "blake3" else hashlib.sha256()


def algorithm_of(digest: object) -> Algorithm | None:
    """Return the algorithm of a digest; None if ``digest`` is none."""
    match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    return None if match is None else "blake3" if match[1] == "blake3" else "sha256"


def of_bytes(data: bytes, algorithm: Algorithm) -> str:
    """Return the digest of ``data``."""
    hashed = hasher(algorithm)
    hashed.update(data)
    return f"{algorithm}:{hashed.hexdigest()}"


@contextmanager
def hash_while_reading(files: Mapping[RegularFile, Algorithm], threads: int) -> Generator[Callable[[RegularFile], str]]:
    """Hash open files while the body reads them, so that no byte is read from disk twice.

    Yields a function file → digest; its first call reads the rest of all files, in ``threads`` threads.
    """
    stop = Event()
    hashes = {file: Hash(file, own, stop) for file, own in files.items() if own not in file.digests}

    def finished(file: RegularFile) -> str:
        if files[file] not in file.digests:
            with ThreadPoolExecutor(threads) as pool:
                for other, text in zip(hashes, pool.map(Hash.digest, hashes.values()), strict=True):
                    other.digests[files[other]] = text
        return file.digests[files[file]]

    for file, partial_hash in hashes.items():
        file.listener = partial_hash.update
    try:
        yield finished
    finally:
        stop.set()
        for file in hashes:
            file.listener = None


def digest(file: RegularFile, algorithm: Algorithm, stop: Event | None = None) -> str:
    """Return the digest of an open file, computed once; empty if ``stop`` was set in the meantime."""
    if algorithm not in file.digests and (text := Hash(file, algorithm, stop).digest()):
        file.digests[algorithm] = text
    return file.digests.get(algorithm, "")


class Hash:
    """Incremental digest of an open file, from bytes read by other code; reads the remaining bytes itself.

    `update` may be the file's listener. `digest` stops reading as soon as ``stop`` is set.
    """

    def __init__(self, file: RegularFile, algorithm: Algorithm, stop: Event | None = None) -> None:
        self._file = file
        self._stop = stop or Event()
        self._algorithm = algorithm
        self._hasher = hasher(algorithm)
        self._done = 0
        self._lock = Lock()

    def update(self, offset: int, data: memoryview) -> None:
        """Add bytes read at ``offset``; calls may come from any thread, in any order (file order avoids rereading)."""
        with self._lock:
            if offset + len(data) > self._done:
                self._read_to(offset)
                self._hasher.update(data[self._done - offset :])
                self._done = offset + len(data)

    def digest(self) -> str:
        """Return the digest of the whole file; empty if ``stop`` was set."""
        with self._lock:
            self._read_to(self._file.size)
        return "" if self._stop.is_set() else f"{self._algorithm}:{self._hasher.hexdigest()}"

    def _read_to(self, offset: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK, max(0, offset - self._done))))
        while self._done < offset and not self._stop.is_set():
            part = buffer[: min(_CHUNK, offset - self._done)]
            self._file.fill(self._done, part)
            self._hasher.update(part)
            self._done += len(part)
