"""A range of bytes of an open file, with the interface of a file."""

from __future__ import annotations

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile


class FilePart(RegularFile):
    """Bytes ``start`` to ``start + size`` of ``file``; the file is not closed with it.

    Reads outside of the part are refused, so damage never exposes bytes of a neighbouring part.
    """

    def __init__(self, file: RegularFile, start: int, size: int) -> None:
        assert start >= 0 and start + size <= file.size
        self.path = file.path
        self.size = size
        self._file = file
        self._from = start

    def read_into(self, offset: int, out: memoryview) -> None:
        """See `RegularFile`; ``offset`` counts from the start of the part."""
        if offset < 0 or offset + len(out) > self.size:
            raise InputError(
                f"is damaged: a part of {self.size} bytes should have {offset + len(out)}", path=self._file.path
            )
        self._file.read_into(self._from + offset, out)

    def close(self) -> None:
        """Do nothing, because other parts of the file are still in use."""
