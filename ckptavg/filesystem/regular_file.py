"""Read regular files by ``pread`` only: unlike a memory map, this cannot raise SIGBUS if a file shrinks."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Self

from ckptavg.errors import InputError
from ckptavg.runtime import signals


class RegularFile:
    """A regular file opened without blocking, with checks for concurrent changes; links are followed.

    Raises:
        InputError: if it is missing, unreadable or not a regular file (a FIFO would hang an ordinary ``open``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            _refuse(path, error)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
            kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
            raise InputError(f"is a {kind}, not a regular file", path=path)
        self.size = status.st_size
        self.inode = status.st_dev, status.st_ino  # equal for two names of one file
        # if all of these are equal, the content is taken to be unchanged
        self.identity = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        self.changed = status.st_mtime_ns / 1e9  # modification time when it was opened, in seconds since the epoch
        self.digests: dict[str, str] = {}  # those that are known, by algorithm; see `ckptavg.filesystem.digest`
        # called with the offset and the data of every read; it must not keep the data
        self.listener: Callable[[int, memoryview], None] | None = None
        self._status = status
        with suppress(OSError, AttributeError):  # optional: reduces the time of an average from disk to 0.9 ×
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes at ``offset``; for headers, not for tensors."""
        buffer = bytearray(size)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes at ``offset`` and call the listener; raises InputError if it ends before."""
        self.fill(offset, out)
        if self.listener is not None:
            self.listener(offset, out)

    def fill(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` as `read_into` does, without calling the listener."""
        signals.check()
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                _refuse(self.path, error)
            if count == 0:
                present, needed = os.fstat(self._fd).st_size, offset + len(out)
                message = f"file is truncated: {present} bytes present, but {needed} are needed (still being written?)"
                raise InputError(message, path=self.path)
            done += count

    def check_unchanged(self) -> None:
        """Raise InputError if the file was changed, or replaced under its name, since it was opened."""
        content = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        opened = os.fstat(self._fd)
        changed = _differ(self._status, opened, *content)
        with suppress(OSError):  # deleted or renamed: the open descriptor still refers to the old content
            changed |= _differ(self._status, self.path.stat(), *content)
            # ctime alone changes if mtime was restored after a write, and not with a new hard link (last.ckpt)
            explained = _differ(self._status, opened, "st_nlink", "st_mode", "st_uid", "st_gid")
            changed |= _differ(self._status, opened, "st_ctime_ns") and not explained
        if changed:
            message, hint = "changed while it was being read", "run again when training has finished"
            raise InputError(message, path=self.path, hint=hint)

    def close(self) -> None:
        """Close the file; may be called repeatedly."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
            raise InputError(f"is damaged: a part of {self.size} bytes should have {offset + len(out)}", path=self.path)
        self._file.read_into(self._from + offset, out)

    def close(self) -> None:
        """Do nothing, because other parts of the file are still in use."""


def is_folder(path: Path) -> bool:
    """Return True if ``path`` is a directory; False if it cannot be accessed, in which case opening it raises."""
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises if permission is denied or the name is too long


def is_file(path: Path) -> bool:
    """Return True if ``path`` is a regular file; False if it cannot be accessed."""
    return os.path.isfile(path)  # noqa: PTH113


def _differ(before: os.stat_result, now: os.stat_result, *names: str) -> bool:
    return any(getattr(before, name) != getattr(now, name) for name in names)


def _refuse(path: Path, error: OSError) -> NoReturn:
    dangling = error.errno == errno.ENOENT and path.is_symlink()
    message = {
        errno.ENOENT: "is a link to a file that does not exist" if dangling else "no such file",
        errno.ELOOP: "is a link that leads back to itself",
        errno.ENXIO: "is a FIFO or socket, not a regular file",
    }.get(error.errno or 0, os.strerror(error.errno or 0).lower())
    raise InputError(message, path=path) from error
