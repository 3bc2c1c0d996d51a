"""Read regular files by ``pread`` only: unlike a memory map, this cannot raise SIGBUS if a file shrinks."""

from __future__ import annotations

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
    """A regular file opened without blocking, with checks for concurrent changes.

    Attributes:
        size: size in bytes.
        sha256: SHA-256 of its bytes in hexadecimal, once computed.
        listener: callback ``(offset, data)`` for every read; it must not keep ``data``.

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
        self.sha256: str | None = None
        self.listener: Callable[[int, memoryview], None] | None = None
        self._status = status
        with suppress(OSError, AttributeError):  # optional: reduces the time of an average from disk to 0.9 ×
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def inode(self) -> tuple[int, int]:
        """(device, inode), equal for two names of one file."""
        return self._status.st_dev, self._status.st_ino

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """Inode, size, mtime and ctime; if all are equal, the content is taken to be unchanged."""
        status = self._status
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    @property
    def changed(self) -> float:
        """Modification time when the file was opened, in seconds since the epoch."""
        return self._status.st_mtime_ns / 1e9

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes at ``offset``; for headers, not for tensors."""
        buffer = bytearray(size)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` (contiguous bytes) with the bytes at ``offset``, and pass them to the listener.

        Raises:
            InputError: if the file ends before ``out`` is full.
        """
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
                raise InputError(
                    f"file is truncated: {os.fstat(self._fd).st_size} bytes present, "
                    f"but {offset + len(out)} are needed (still being written?)",
                    path=self.path,
                )
            done += count

    def check_unchanged(self) -> None:
        """Raise InputError if the file was changed, or replaced under its name, since it was opened."""
        opened = os.fstat(self._fd)
        try:
            named = self.path.stat()
        except OSError:  # deleted or renamed: the open descriptor still refers to the old content
            changed = not _same(self._status, opened)
        else:
            changed = not (_same(self._status, named) and _same(self._status, opened)) or _rewritten(
                self._status, opened
            )
        if changed:
            raise InputError(
                "changed while it was being read", path=self.path, hint="run again when training has finished"
            )

    def close(self) -> None:
        """Close the file; may be called repeatedly."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_folder(path: Path) -> bool:
    """Return True if ``path`` is a directory; False if it cannot be accessed, in which case opening it raises."""
    try:
        return path.is_dir()
    except OSError:  # permission denied, or the name is too long
        return False


def is_file(path: Path) -> bool:
    """Return True if ``path`` is a regular file; False if it cannot be accessed."""
    try:
        return path.is_file()
    except OSError:
        return False


def _same(before: os.stat_result, now: os.stat_result) -> bool:
    return all(getattr(before, name) == getattr(now, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns"))


def _rewritten(before: os.stat_result, now: os.stat_result) -> bool:
    """Return True if the file may have been written and its mtime restored: ctime differs for no other known reason.

    A new hard link (a framework creating last.ckpt) also changes ctime, but not the content.
    """
    explained = any(getattr(before, name) != getattr(now, name) for name in ("st_nlink", "st_mode", "st_uid", "st_gid"))
    return before.st_ctime_ns != now.st_ctime_ns and not explained


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return f"is a {kinds.get(stat.S_IFMT(mode), 'device')}"


def _refuse(path: Path, error: OSError) -> NoReturn:
    dangling = error.errno == errno.ENOENT and path.is_symlink()
    message = {
        errno.ENOENT: "is a link to a file that does not exist" if dangling else "no such file",
        errno.EACCES: "permission denied",
        errno.ELOOP: "is a link that leads back to itself",
        errno.ENXIO: "is a FIFO or socket, not a regular file",
    }.get(error.errno or 0, os.strerror(error.errno or 0).lower())
    raise InputError(message, path=path) from error
