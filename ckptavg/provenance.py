"""What a stranger needs to rebuild the output: written into its metadata, without clock, host or absolute path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock
from typing import Any, Final

import ckptavg
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.readers import RegularFile

KEY: Final = "ckptavg"
SCHEMA: Final = 1
_CHUNK: Final = 1 << 20


def metadata(
    checkpoints: Sequence[Checkpoint],
    coefficients: Coefficients,
    strategy: str,
    settings: Mapping[str, Any],
    *,
    dtype: str | None,
    adapter: str = "factors",
    rank: int | None = None,
    not_averaged: Sequence[str],
    recomputed: Sequence[str],
    digest: Callable[[RegularFile], str],
) -> dict[str, str]:
    """The output's safetensors metadata: ``format`` for loaders, and everything else as JSON under ``ckptavg``.

    Sources are the selected candidates with the SHA-256 of each of their files. Entries that all selected candidates
    carry with the same value, such as safetensors' records of tied names, are kept.

    Args:
        checkpoints: all candidates.
        coefficients: theirs.
        strategy: the command's name.
        settings: its settings.
        dtype: the dtype asked for, or None for the candidates' own.
        adapter: how adapters were averaged.
        rank: what an exact one was reduced to.
        not_averaged: the tensors taken from the last selected candidate.
        recomputed: the tensors recomputed from data (BatchNorm statistics).
        digest: the SHA-256 of a source's file, in hexadecimal, or "".
    """
    selected = [(checkpoints[i], coefficients.candidate(i)) for i in coefficients.selected]
    record = {
        "schema": SCHEMA,
        "version": ckptavg.__version__,
        "strategy": strategy,
        "settings": dict(settings),
        "dtype": dtype,
        "adapter": adapter,
        "rank": rank,
        "groups": [list(prefixes) for prefixes in coefficients.groups],
        "not_averaged": list(not_averaged),
        "recomputed": list(recomputed),
        "sources": [
            {
                "name": checkpoint.name,
                "step": checkpoint.step,
                "key": checkpoint.key,
                "coefficient": coefficient,
                "sha256": {file.path.name: digest(file) for file in checkpoint.reader.files},
            }
            for checkpoint, coefficient in selected
        ],
    }
    first = selected[0][0].reader.metadata
    kept = {
        name: value
        for name, value in first.items()
        if name != KEY and all(checkpoint.reader.metadata.get(name) == value for checkpoint, _ in selected)
    }
    return {**kept, "format": "pt", KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))}


def none(_: RegularFile) -> str:
    """In place of a SHA-256 that nobody wants."""
    return ""


def unknown(_: RegularFile) -> str:
    """In place of a SHA-256 that is not known yet, as long as one."""
    return "0" * 64


@contextmanager
def hashing(files: Iterable[RegularFile], threads: int) -> Generator[Callable[[RegularFile], str]]:
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
