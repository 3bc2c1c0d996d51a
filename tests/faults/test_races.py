"""Two runs of one output: one wins, and the others fail before they start to work."""

from __future__ import annotations

import os
import socket
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ckptavg.errors import OutputExistsError
from ckptavg.journal import Journal
from faults import job
from faults.warm import Warm

RACERS, ROUNDS = 6, 5
TASK = Path(job.__file__)


def race(warm: Warm, ckpts: Path, place: Path) -> list[int]:
    """Start racing runs at once, and return their exit codes."""
    gate = place / "gate"
    racers = [warm.start("swa", ckpts, "-o", "out", cwd=place, hook={"gate": str(gate)}) for _ in range(RACERS)]
    gate.touch()
    return sorted(racer.wait().code for racer in racers)


def test_exactly_one_of_several_racing_runs_wins(warm: Warm, ckpts: Path, tmp_path: Path, tally: Counter[str]):
    for number in range(ROUNDS):
        place = tmp_path / str(number)
        place.mkdir()
        codes = race(warm, ckpts, place)
        tally.update({"races": 1, "races without one winner": codes != [0] + [6] * (RACERS - 1)})
        assert codes == [0] + [6] * (RACERS - 1)
        assert {path.name for path in place.iterdir()} == {"gate", "out"} and load_file(place / "out")


def test_the_second_run_does_not_start(warm: Warm, ckpts: Path, tmp_path: Path):
    with Journal(tmp_path / "out"):
        done = warm.run("aswa", ckpts, "--task", TASK, "-o", "out", cwd=tmp_path, LOG=str(tmp_path / "log"))
        assert done.code == 6 and not (tmp_path / "log").exists()
        owner = f"out: another run is writing it (process {os.getpid()} on {socket.gethostname()} since 20"
        assert owner in done.err, done.err


def test_an_output_that_came_to_be_while_the_lock_was_waited_for_is_refused(
    ckpts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import ckptavg

    session = import_module("ckptavg.pipeline.session")  # the package has a function of this name

    class Late(Journal):
        def __enter__(self) -> Late:
            (tmp_path / "out").write_text("another run's")
            return self

    monkeypatch.setattr(session, "Journal", Late)
    with pytest.raises(OutputExistsError, match="exists already"):
        ckptavg.swa(ckpts, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_the_lock_of_a_killed_run_is_taken_over_at_once(warm: Warm, ckpts: Path, tmp_path: Path):
    """Also while worker processes of its loaders live on for some seconds."""
    arguments = ("twa", ckpts, "--task", TASK, "--epochs", 2, "-o", "out")
    killed = warm.run(*arguments, cwd=tmp_path, WORKERS="2", LOG=str(tmp_path / "log"), STOP="7:SIGKILL")
    assert killed.code == -9 and "process" in (tmp_path / "out.ckptavg" / "lock").read_text()
    done = warm.run(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
