"""The lock of an output: live and dead owners, and races with other processes."""

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


def dead_pid() -> int:
    """Return the id of a process that has exited."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ("", True),
        ("nonsense", True),
        (f"process {dead_pid()} on {socket.gethostname()} since 2026-01-01 00:00:00 UTC", True),
        (f"process {os.getpid()} on {socket.gethostname()} since 2026-01-01 00:00:00 UTC", False),
        (f"process 1 on {socket.gethostname()} since 2026-01-01 00:00:00 UTC", False),
        (f"process {dead_pid()} on elsewhere since 2026-01-01 00:00:00 UTC", False),
    ],
    ids=["empty", "nonsense", "dead process", "this process", "live process", "other host"],
)
def test_without_kernel_locks_a_dead_owner_is_detected_by_process_id(
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


def test_a_process_of_another_user_counts_as_alive(monkeypatch: pytest.MonkeyPatch):
    def kill(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(lock.os, "kill", kill)
    assert lock._is_alive(f"process 5 on {socket.gethostname()} since then")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_file_removed_by_its_owner_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
):
    """The owner finishes between the opening and the locking of its lock file, and another run may create one."""
    path, real = tmp_path / "out.ckptavg" / "lock", lock.hold
    calls: list[int] = []

    def hold(fd: int) -> bool:
        calls.append(fd)
        if len(calls) == 1:
            path.unlink()
            if replaced:
                path.touch()
        return real(fd)

    monkeypatch.setattr(lock, "hold", hold)
    fd = lock.take(path, tmp_path / "out")
    assert len(calls) == 2 and os.fstat(fd).st_ino == path.stat().st_ino
    lock.release(fd)


def test_a_directory_removed_by_its_owner_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_a_lock_on_a_full_disk_does_not_name_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "out.ckptavg" / "lock"
    with monkeypatch.context() as patch:
        patch.setattr(lock.os, "pwrite", pwrite)
        fd = lock.take(path, tmp_path / "out")
    with pytest.raises(OutputExistsError, match=r"another run is writing it \(another process\)"):
        Journal(tmp_path / "out")
    lock.release(fd)
