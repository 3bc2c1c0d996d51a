"""Write files atomically and durably.

A file is written next to its destination under a temporary name and renamed last. The temporary file is locked while
its writer is alive, so the next run can recognize and remove those of killed runs.
"""

import errno
import os
import re
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from ckptavg.errors import OutputError
from ckptavg.filesystem import lock


class Temporary:
    """A new temporary file next to ``destination``, open and locked; raises OSError if it cannot be created."""

    def __init__(self, destination: Path) -> None:
        self._owned = True
        self.path = destination.with_name(f".{destination.name}.{os.getpid()}.ckptavg-tmp")
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks: no run will remove it either
            lock.hold(self.fd)

    @classmethod
    def joined(cls, path: Path) -> Self:
        """Open the temporary file of another live process for shared writing; that process remains its owner."""
        file = cls.__new__(cls)
        file.path, file._owned = path, False
        file.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return file

    def write(self, data: memoryview | bytes, position: int) -> None:
        """Write all of ``data`` at ``position``."""
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self.fd, view[done:], position + done)

    def remove(self) -> None:
        """Close the file and unlink the temporary name, once; if that fails, the next run removes it."""
        if self._owned:
            with suppress(OSError):
                os.unlink(self.path)  # noqa: PTH108
        if self.fd >= 0:
            with suppress(OSError):
                lock.release(self.fd)
        self._owned, self.fd = False, -1


@contextmanager
def temporary_file(path: Path, data: bytes) -> Generator[Callable[[], os.stat_result]]:
    """Write a small file under a temporary name, flushed; yields a function that renames it, replacing ``path``.

    The function returns the file's status. Both raise OutputError if it cannot be written.
    """
    with ExitStack() as stack:
        with output_errors(path, len(data)):
            file = Temporary(path)
            stack.callback(file.remove)
            file.write(data, 0)
            os.fsync(file.fd)

        def publish() -> os.stat_result:
            with output_errors(path, len(data)):
                status = os.fstat(file.fd)
                os.replace(file.path, path)  # noqa: PTH105
            return status

        yield publish


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically, replacing an existing one; raises OutputError if it cannot be written."""
    with temporary_file(path, data) as publish:
        publish()
    flush_folder(path)


def stale_temporaries(folder: Path, name: str | None = None) -> list[Path]:
    """List the temporary files, of destination ``name`` or of any, whose writers are dead; none if unreadable."""
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.\d+\.ckptavg-tmp", re.DOTALL)
    try:
        temporaries = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    except OSError:
        return []
    return [path for path in temporaries if not _locked(path)]


def longest_name(folder: Path) -> int:
    """Return the maximum length in bytes of a file name in a directory, leaving room for the temporary suffix."""
    try:
        limit = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):  # the limit of most file systems
        limit = 255
    return limit - len(f"..{2**22}.ckptavg-tmp")


def flush_folder(path: Path) -> None:
    """Fsync the directory of a file, so that its name survives a power cut; raises OutputError if that fails."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        message = f"is written, but its directory could not be flushed to the disk: {os_message(error)}"
        raise OutputError(message, path=path) from error


@contextmanager
def output_errors(path: Path, size: int) -> Generator[None]:
    """Raise OutputError in place of OSError while ``path`` of ``size`` bytes is written."""
    try:
        yield
    except OSError as error:
        message = os_message(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"{message}: {size:,} bytes are needed, {free(path.parent):,} are free"
        raise OutputError(f"cannot be written: {message}", path=path) from error


def free(folder: Path) -> int:
    """Return the free space of a directory's file system in bytes."""
    space = os.statvfs(folder)
    return space.f_frsize * (space.f_bavail if os.geteuid() else space.f_bfree)


def os_message(error: OSError) -> str:
    """Return the operating system's message for the error, in lower case."""
    return os.strerror(error.errno or 0).lower()


def _locked(path: Path) -> bool:
    """Return True if the writer of a temporary file is alive, or if this cannot be determined."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return not lock.hold(fd)
        finally:
            lock.release(fd)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically, or to a pipe or a device directly; raise OutputError if this fails."""
    data = text.encode(errors="backslashreplace")
    try:
        target = path.resolve()
    except OSError as error:  # the working directory was removed
        raise OutputError(f"cannot be written: {os_message(error)}", path=path) from error
    if target.is_file() or not target.exists():
        write_bytes(target, data)
        return
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", path=path) from error
