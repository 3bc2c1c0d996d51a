"""The lock of an output: who has it, who is dead, and what others do to it meanwhile."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ckptavg.errors import OutputExistsError
from ckptavg.filesystem import lock
from ckptavg.journal import Journal


def dead() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ("", True),
        ("nonsense", True),
        (f"process {dead()} on {socket.gethostname()} since 2026-01-01 00:00:00 UTC", True),
        (f"process {os.getpid()} on {socket.gethostname()} since 2026-01-01 00:00:00 UTC", False),
        (f"process 1 on {socket.gethostname()} since 2026-01-01 00:00:00 UTC", False),
        (f"process {dead()} on elsewhere since 2026-01-01 00:00:00 UTC", False),
    ],
    ids=["nobody", "nonsense", "a dead one", "this one", "another living one", "one elsewhere"],
)
def test_without_the_kernels_locks_a_dead_owner_is_known_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, free: bool
):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    (tmp_path / "out.ckptavg").mkdir()
    (tmp_path / "out.ckptavg" / "lock").write_text(owner)
    if free:
        with Journal(tmp_path / "out") as journal:
            assert f"process {os.getpid()} on" in (journal.folder / "lock").read_text()
    else:
        with pytest.raises(OutputExistsError, match=owner.replace("(", ".")):
            Journal(tmp_path / "out")


def test_an_owner_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch):
    def kill(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(lock.os, "kill", kill)
    assert lock._lives(f"process 5 on {socket.gethostname()} since then")


def test_a_lock_that_its_owner_took_away_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The owner is done between our opening of its lock and our taking it."""
    path, real = tmp_path / "out.ckptavg" / "lock", lock.hold
    calls: list[int] = []

    def hold(fd: int) -> bool:
        calls.append(fd)
        if len(calls) == 1:
            path.unlink()
        return real(fd)

    monkeypatch.setattr(lock, "hold", hold)
    fd = lock.take(path, tmp_path / "out")
    assert len(calls) == 2 and os.fstat(fd).st_ino == path.stat().st_ino
    lock.release(fd)


def test_a_directory_that_its_owner_took_away_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, real = tmp_path / "out.ckptavg" / "lock", os.open
    calls: list[object] = []

    def opened(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 1:
            path.parent.rmdir()
        return real(*arguments)  # pyright: ignore

    monkeypatch.setattr(lock.os, "open", opened)
    lock.release(lock.take(path, tmp_path / "out"))
    assert len(calls) == 2 and path.exists()


def test_a_lock_on_a_full_disk_is_nameless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "out.ckptavg" / "lock"
    with monkeypatch.context() as patch:
        patch.setattr(lock.os, "pwrite", pwrite)
        fd = lock.take(path, tmp_path / "out")
    with pytest.raises(OutputExistsError, match=r"another run is writing it \(another process\)"):
        Journal(tmp_path / "out")
    lock.release(fd)
