"""Locks on open files, released by the kernel whenever their process dies."""

import fcntl
import os
import re
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from ckptavg.errors import OutputExistsError


def hold(fd: int) -> bool:
    """Lock an open file; returns False if another process holds the lock, raises OSError if there are no locks here."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    _held().add(fd)
    return True


def release(fd: int) -> None:
    """Close a file, which releases its lock."""
    _held().discard(fd)
    os.close(fd)


def take(path: Path, output: Path) -> int:
    """Create and lock the file ``path``, and write the owner's process, host and start time into it.

    A lock file whose owner is dead is taken over. On file systems without locks, this is detected by process id, and
    only for owners on this host.

    Args:
        path: the lock file; its directory is created too, and the lock's owner may remove both.
    Returns:
        The open file descriptor, to be passed to `release`.
    Raises:
        OutputExistsError: if another process holds the lock of ``output``; the message names its owner.
        OSError: if the file cannot be created.
    """
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the owner has just finished and removed the directory
            continue
        owner = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
        try:
            acquired = hold(fd)
        except OSError:
            acquired = not _is_alive(owner)
        if not acquired:
            os.close(fd)
            message = f"another run is writing it ({owner or 'another process'})"
            raise OutputExistsError(message, path=output, hint="wait for it, or choose another -o")
        with suppress(FileNotFoundError):  # the owner has just finished and removed the file
            if os.path.samestat(path.stat(), os.fstat(fd)):
                since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
                with suppress(OSError):  # on a full disk the owner is not recorded
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
                return fd
        release(fd)


def _is_alive(owner: str) -> bool:
    recorded = re.match(r"process (\d+) on (\S+)", owner)
    if recorded and recorded[2] == socket.gethostname():
        try:
            os.kill(int(recorded[1]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return recorded is not None


@cache
def _held() -> set[int]:
    """Return the locked file descriptors; forked children close them, as they would keep the locks held."""
    held: set[int] = set()

    def forget() -> None:
        while held:
            os.close(held.pop())

    os.register_at_fork(after_in_child=forget)
    return held
