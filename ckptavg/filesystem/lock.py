"""Locks on open files, which the kernel takes back when their process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from ckptavg.errors import OutputExistsError

_SINCE: Final = "%Y-%m-%d %H:%M:%S UTC"


def hold(fd: int) -> bool:
    """Lock an open file for this process; False if another one has it.

    Raises:
        OSError: if the file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    _held().add(fd)
    return True


def release(fd: int) -> None:
    """Close a file, and with it its lock."""
    _held().discard(fd)
    os.close(fd)


def take(path: Path, output: Path) -> int:
    """Make and lock the file ``path``, and write into it who has it.

    A lock file whose owner is dead is taken over. Where the file system has no locks, that is known of owners on this
    host only, by their process id.

    Args:
        path: the lock; its directory is made too, and may be removed with it by who has the lock.
        output: what it protects.
    Returns:
        The open file; `release` it.
    Raises:
        OutputExistsError: naming the owner.
        OSError: if it cannot be made.
    """
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the owner was done in between, and took the directory away
            continue
        owner = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
        try:
            free = hold(fd)
        except OSError:
            free = not _lives(owner)
        if not free:
            os.close(fd)
            raise OutputExistsError(
                f"another run is writing it ({owner or 'another process'})", path=output,
                hint="wait for it, or choose another -o",
            )  # fmt: skip
        if _is_still(path, fd):
            mine = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime(_SINCE, time.gmtime())}\n"
            with suppress(OSError):  # on a full disk the lock is nameless
                os.ftruncate(fd, 0)
                os.pwrite(fd, mine.encode(), 0)
            return fd
        release(fd)


def _is_still(path: Path, fd: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(fd))
    return False


def _lives(owner: str) -> bool:
    words = owner.split()
    if len(words) < 4 or not words[1].isdecimal():
        return False  # nobody has written into it
    if words[3] != socket.gethostname():
        return True
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@cache
def _held() -> set[int]:
    """The files that this process has locked. A forked one closes them, or it would hold them after our death."""
    held: set[int] = set()

    def forget() -> None:
        for fd in held:
            os.close(fd)
        held.clear()

    os.register_at_fork(after_in_child=forget)
    return held
