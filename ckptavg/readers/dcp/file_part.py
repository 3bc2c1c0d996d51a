"""A run of bytes of an open file, read as if it were a file of its own."""

from __future__ import annotations

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile


class FilePart(RegularFile):
    """The ``size`` bytes of ``file`` from ``start`` on; whoever opened the file closes it.

    Nothing is read outside of the part: its neighbours' bytes are never taken for its own.
    """

    def __init__(self, file: RegularFile, start: int, size: int) -> None:
        assert start >= 0 and start + size <= file.size
        self.path = file.path
        self.size = size
        self._file = file
        self._from = start

    @property
    def inode(self) -> tuple[int, int]:
        """See `RegularFile`."""
        return self._file.inode

    def read_into(self, offset: int, out: memoryview) -> None:
        """See `RegularFile`; an offset counts from the start of the part."""
        if offset < 0 or offset + len(out) > self.size:
            raise InputError(
                f"is damaged: a part of {self.size} bytes should have {offset + len(out)}", path=self._file.path
            )
        self._file.read_into(self._from + offset, out)

    def check_unchanged(self) -> None:
        """See `RegularFile`."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Do nothing: other parts are still read."""
