"""Files that are there whole and on the disk, or not at all.

Each is made beside its destination under a temporary name and gets its own name last. A temporary file is locked as
long as its writer lives, so the next run knows what a killed one left, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Self

from ckptavg.errors import OutputError
from ckptavg.filesystem import lock


class Temporary:
    """A new file beside ``destination``, open and locked.

    Raises:
        OSError: if it cannot be made.
    """

    def __init__(self, destination: Path) -> None:
        self._owned = True
        self.path = destination.with_name(f".{destination.name}.{os.getpid()}.ckptavg-tmp")
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: nobody will sweep it either
            lock.hold(self.fd)

    @classmethod
    def joined(cls, path: Path) -> Self:
        """The temporary file of another process that lives, to be written together; it stays that one's."""
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
        """Close it and take the temporary name away; what cannot be removed now is swept by the next run."""
        if self._owned:
            with contextlib.suppress(OSError):
                os.unlink(self.path)  # noqa: PTH108
        with contextlib.suppress(OSError):
            lock.release(self.fd)


@contextmanager
def temporary_file(path: Path, data: bytes) -> Generator[Callable[[], None]]:
    """A small file under a temporary name, on the disk; what is yielded gives it its name, replacing an existing one.

    Raises:
        OutputError: if it cannot be written.
    """

    def publish() -> None:
        try:
            os.replace(file.path, path)  # noqa: PTH105
        except OSError as error:
            raise_output_error(path, error, len(data))

    try:
        file = Temporary(path)
    except OSError as error:
        raise_output_error(path, error, len(data))
    try:
        try:
            file.write(data, 0)
            os.fsync(file.fd)
        except OSError as error:
            raise_output_error(path, error, len(data))
        yield publish
    finally:
        file.remove()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all; an existing one is replaced.

    Raises:
        OutputError: if it cannot be written.
    """
    with temporary_file(path, data) as publish:
        publish()
    flush_folder(path)


def write_text(path: Path, text: str) -> None:
    """See `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def stale_temporaries(folder: Path, name: str | None = None) -> list[Path]:
    """The temporary files of writers that are dead.

    Args:
        folder: where to look; there are none in one that does not exist.
        name: of the destination that they were to become; None is any.
    """
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.\d+\.ckptavg-tmp", re.DOTALL)
    try:
        found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    except OSError:
        return []
    return [path for path in found if not _locked(path)]


def longest_name(folder: Path) -> int:
    """The most bytes that the name of a file in a directory may have, so that its temporary one is possible too."""
    try:
        most = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):  # what most file systems have
        most = 255
    return most - len(f"..{2**22}.ckptavg-tmp")


def flush_folder(path: Path) -> None:
    """Make the name of a file that is there survive a power cut.

    Raises:
        OutputError: if the disk refuses.
    """
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        what = f"is written, but its directory could not be flushed to the disk: {os_message(error)}"
        raise OutputError(what, path=path) from error


def raise_output_error(path: Path, error: OSError, size: int) -> NoReturn:
    """Say why ``path``, ``size`` bytes long, cannot be written."""
    what = os_message(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = f"{what}: {size:,} bytes are needed, {free(path.parent):,} are free"
    raise OutputError(f"cannot be written: {what}", path=path) from error


def free(folder: Path) -> int:
    """The bytes that may still be written into a directory."""
    space = os.statvfs(folder)
    return space.f_frsize * (space.f_bavail if os.geteuid() else space.f_bfree)


def os_message(error: OSError) -> str:
    """What the system calls the error."""
    return os.strerror(error.errno or 0).lower()


def _locked(path: Path) -> bool:
    """Whether its writer lives, or nobody can tell."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return not lock.hold(fd)
    except OSError:
        return True
    finally:
        lock.release(fd)
