"""An open regular file, only ever read by ``pread``: without a memory map a shrinking file is no SIGBUS."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NoReturn, Self

from ckptavg.errors import InputError


class RegularFile:
    """A file opened without blocking, checked to be a regular file, and watched for changes.

    Args:
        path: the file; links are followed.
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
            raise InputError(_kind(status.st_mode) + ", not a regular file", path=path)
        self.size = status.st_size
        self._identity = _identity(status)

    @property
    def inode(self) -> tuple[int, int]:
        """(device, inode): equal for two names of one file."""
        return self._identity[0], self._identity[1]

    @property
    def changed(self) -> float:
        """When it was last changed before it was opened, in seconds since the epoch."""
        return self._identity[3] / 1e9

    def read(self, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset``; for headers, not for tensors."""
        buffer = bytearray(size)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` (contiguous bytes) with the bytes at ``offset``.

        Raises:
            InputError: if the file ends before ``out`` is full.
        """
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                _refuse(self.path, error)
            if count == 0:
                raise InputError(
                    f"file is truncated: {os.fstat(self._fd).st_size} bytes present, "
                    f"but {offset + len(out)} are needed (still being written?)",
                    path=self.path,
                )
            done += count

    def check_unchanged(self) -> None:
        """Raise InputError if the file was changed, or replaced under its name, since it was opened."""
        try:
            named = _identity(self.path.stat())
        except OSError:
            named = self._identity  # deleted: the open descriptor still holds the old bytes
        if _identity(os.fstat(self._fd)) != self._identity or named != self._identity:
            raise InputError(
                "changed while it was being read", path=self.path, hint="run again when training has finished"
            )

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a directory; what cannot even be looked at is none, and opening it says why."""
    try:
        return path.is_dir()
    except OSError:  # permission denied, a name that is too long
        return False


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file; what cannot even be looked at is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    # not ctime: a second link to the file (a framework making last.ckpt) changes it, the bytes stay
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "is a directory"),
        (stat.S_ISFIFO, "is a FIFO"),
        (stat.S_ISSOCK, "is a socket"),
        (stat.S_ISCHR, "is a device"),
        (stat.S_ISBLK, "is a device"),
    ):
        if test(mode):
            return name
    return "is special"


def _refuse(path: Path, error: OSError) -> NoReturn:
    dangling = error.errno == errno.ENOENT and path.is_symlink()
    what = {
        errno.ENOENT: "is a link to a file that does not exist" if dangling else "no such file",
        errno.EACCES: "permission denied",
        errno.ELOOP: "is a link that leads back to itself",
        errno.ENXIO: "is a FIFO or socket, not a regular file",
    }.get(error.errno or 0, os.strerror(error.errno or 0).lower())
    raise InputError(what, path=path) from error
