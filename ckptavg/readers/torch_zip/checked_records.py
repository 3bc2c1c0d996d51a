"""Records whose CRC-32 is checked while they are read; ``torch.load`` never checks it."""

import zlib
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile

_BLOCK: Final = 1 << 20


@dataclass(slots=True, eq=False)
class CheckedRecord:
    """The ``size`` bytes of ``file`` from ``start`` on; reading them front to back checks them without extra reads.

    Reading in another order first reads the whole record once. Thread-safe.
    """

    file: RegularFile
    name: str
    start: int
    size: int
    crc: int
    is_good: bool  # the checksum was found to match, or the file has none
    _lock: Lock = field(default_factory=Lock)
    _position: int = 0  # end of the bytes that the running checksum covers
    _running: int = 0

    def read(self) -> bytes:
        """Return all bytes, checked."""
        content = bytearray(self.size)
        self.read_into(0, memoryview(content), stop=self.size)
        return bytes(content)

    def read_into(self, start: int, out: memoryview, *, stop: int) -> None:
        """Fill ``out`` with the bytes from ``start`` on, within the record.

        Args:
            stop: end of the caller's sequential pass; the call that reaches it reads the rest of the record.
        Raises:
            InputError: if the file was truncated or, once the record is complete, its checksum does not match.
        """
        if not self.is_good:
            with self._lock:
                if start == 0:
                    self._position = self._running = 0  # a new pass from the front
                if start == self._position and not self.is_good:
                    self._advance(out)
                    if self._position >= stop:
                        self._finish()
                    return
            self.check()
        self.file.read_into(self.start + start, out)

    def check(self) -> None:
        """Raise InputError unless the checksum matches, or the file has none."""
        with self._lock:
            if not self.is_good:
                self._finish()

    def _advance(self, out: memoryview) -> None:
        self.file.read_into(self.start + self._position, out)
        self._running = zlib.crc32(out, self._running)
        self._position += len(out)

    def _finish(self) -> None:
        block = memoryview(bytearray(min(_BLOCK, self.size - self._position)))
        while self._position < self.size:
            self._advance(block[: self.size - self._position])
        if self._running != self.crc:
            self._position = self._running = 0  # so that the next read fails again
            raise InputError(f"checksum of record {self.name} does not match: the file is damaged", path=self.file.path)
        self.is_good = True
