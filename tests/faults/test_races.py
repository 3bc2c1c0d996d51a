"""Two runs of one output: one wins, and the others say so before they start to work."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ckptavg import lock
from ckptavg.errors import OutputExistsError
from ckptavg.journal import Journal
from faults import job
from faults.warm import Warm

RACERS, ROUNDS = 6, 5
TASK = Path(job.__file__)


def race(warm: Warm, ckpts: Path, place: Path) -> list[int]:
    """Start racers at once, and give their exit codes."""
    gate = place / "gate"
    racers = [warm.start("swa", ckpts, "-o", "out", cwd=place, hook={"gate": str(gate)}) for _ in range(RACERS)]
    gate.touch()
    return sorted(racer.wait().code for racer in racers)


def test_of_racing_runs_exactly_one_wins(warm: Warm, ckpts: Path, tmp_path: Path, tally: Counter[str]):
    for number in range(ROUNDS):
        place = tmp_path / str(number)
        place.mkdir()
        codes = race(warm, ckpts, place)
        tally.update({"races": 1, "races without one winner": codes != [0] + [6] * (RACERS - 1)})
        assert codes == [0] + [6] * (RACERS - 1)
        assert {path.name for path in place.iterdir()} == {"gate", "out"} and load_file(place / "out")


def test_who_comes_second_does_not_begin(warm: Warm, ckpts: Path, tmp_path: Path):
    with Journal(tmp_path / "out"):
        done = warm.run("aswa", ckpts, "--task", TASK, "-o", "out", cwd=tmp_path, LOG=str(tmp_path / "log"))
        assert done.code == 6 and not (tmp_path / "log").exists()
        owner = f"out: another run is writing it (process {os.getpid()} on {socket.gethostname()} since 20"
        assert owner in done.err, done.err


def test_an_output_that_came_to_be_while_the_lock_was_waited_for_is_refused(
    ckpts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import ckptavg
    from ckptavg import session

    class Late(Journal):
        def __enter__(self) -> Late:
            (tmp_path / "out").write_text("another run's")
            return self

    monkeypatch.setattr(session, "Journal", Late)
    with pytest.raises(OutputExistsError, match="exists already"):
        ckptavg.swa(ckpts, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_the_lock_of_a_killed_run_is_taken_over_at_once(warm: Warm, ckpts: Path, tmp_path: Path):
    """Also where its loaders' workers live on for some seconds."""
    arguments = ("twa", ckpts, "--task", TASK, "--epochs", 2, "-o", "out")
    killed = warm.run(*arguments, cwd=tmp_path, WORKERS="2", LOG=str(tmp_path / "log"), STOP="7:SIGKILL")
    assert killed.code == -9 and "process" in (tmp_path / "out.ckptavg" / "lock").read_text()
    done = warm.run(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err


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
