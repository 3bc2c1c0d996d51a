"""Records whose CRC-32 is checked while they are read; ``torch.load`` never checks it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.readers.torch_zip.zip_directory import Record

_BLOCK: Final = 1 << 20


@dataclass(slots=True)
class _Sum:
    """Running checksum of a record up to ``position``."""

    lock: Lock = field(default_factory=Lock)
    position: int = 0
    crc: int = 0


class CheckedRecords:
    """Records of one file; reading a record front to back checks it without extra reads.

    Reading in another order first reads the whole record once. Thread-safe.

    Args:
        file: the file.
        records: name → location.
        checked: whether the file has checksums; if not, nothing is checked.
    """

    def __init__(self, file: RegularFile, records: Mapping[str, Record], *, checked: bool) -> None:
        self._file = file
        self._records = records
        self._checked = checked
        self._good: set[str] = set()
        self._running: dict[str, _Sum] = {}
        self._lock = Lock()

    def read(self, name: str) -> bytes:
        """Return the whole record ``name``, checked."""
        content = bytearray(self._records[name].size)
        self.read_into(name, 0, memoryview(content), stop=len(content))
        return bytes(content)

    def read_into(self, name: str, start: int, out: memoryview, *, stop: int) -> None:
        """Fill ``out`` with record ``name`` from byte ``start`` on.

        Args:
            name: the record.
            start: the first byte.
            out: contiguous bytes, within the record.
            stop: end of the caller's sequential pass; the call that reaches it reads the rest of the record.
        Raises:
            InputError: if the file was truncated or, once the record is complete, its checksum does not match.
        """
        if not self._is_good(name):
            with self._lock:
                running = self._running.setdefault(name, _Sum())
            with running.lock:
                if start == 0:
                    running.position = running.crc = 0  # a new pass from the front
                if start == running.position and not self._is_good(name):
                    self._advance(name, running, out)
                    if running.position >= stop:
                        self._finish(name, running)
                    return
            self.check(name)
        self._file.read_into(self._records[name].start + start, out)

    def check(self, name: str) -> None:
        """Raise InputError unless the checksum of record ``name`` matches its bytes, or it has none."""
        if self._is_good(name):
            return
        with self._lock:
            running = self._running.setdefault(name, _Sum())
        with running.lock:
            if not self._is_good(name):
                self._finish(name, running)

    def _is_good(self, name: str) -> bool:
        return name in self._good or not self._checked

    def _advance(self, name: str, running: _Sum, out: memoryview) -> None:
        self._file.read_into(self._records[name].start + running.position, out)
        running.crc = zlib.crc32(out, running.crc)
        running.position += len(out)

    def _finish(self, name: str, running: _Sum) -> None:
        record = self._records[name]
        if running.position < record.size:
            block = memoryview(bytearray(min(_BLOCK, record.size - running.position)))
            while running.position < record.size:
                self._advance(name, running, block[: record.size - running.position])
        if running.crc != record.crc:
            running.position = running.crc = 0  # so that the next read fails again
            raise InputError(f"checksum of record {name} does not match: the file is damaged", path=self._file.path)
        self._good.add(name)
        with self._lock:
            self._running.pop(name, None)
