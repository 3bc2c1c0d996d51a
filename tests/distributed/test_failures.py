"""A failure of one worker ends all workers: one line of error, no output, and the measurements are kept."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Job, Run

from distributed.conftest import Torchrun

Twa = tuple[object, ...]


@pytest.fixture
def twa(jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Twa:
    """Return a command; its task is in a new directory, since modules that pytest imported beside it would count."""
    task = shutil.copy(Path(__file__).with_name("failing_task.py"), tmp_path_factory.mktemp("task"))
    folder = jobs["transformer"].folder
    return ("twa", folder, "--last", 4, "--epochs", 4, "--patience", 2, "--task", task, "-o", "out")


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the workers' output without torchrun's own report of the failed rank."""
    return [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]


def test_an_error_of_one_worker_is_printed_once(torchrun: Torchrun, twa: Twa, tmp_path: Path):
    done = torchrun(2, "-m", "ckptavg", *twa, cwd=tmp_path, check=False, HOW="raise")
    assert done.returncode != 0 and done.stdout == ""
    lines = error_lines(done)
    assert len(lines) == 2 and ": in loss, batch " in lines[0] and "ValueError: only here" in lines[0], done.stderr
    assert list(tmp_path.iterdir()) == []  # no output, no temporary files, no journal of a task that will change


def test_a_signal_to_one_worker_ends_all_of_them(torchrun: Torchrun, twa: Twa, tmp_path: Path):
    done = torchrun(2, "-m", "ckptavg", *twa, cwd=tmp_path, check=False, HOW="signal")
    assert done.returncode != 0 and done.stdout == ""
    error, hint = error_lines(done)
    assert error == "error: interrupted; nothing was written" and hint.endswith("run the same command to resume")
    assert not (tmp_path / "out").exists()


def test_workers_time_out(torchrun: Torchrun, twa: Twa, tmp_path: Path):
    done = torchrun(2, "-m", "ckptavg", *twa, "--worker-timeout", 2, cwd=tmp_path, check=False, HOW="hang")
    assert done.returncode != 0 and done.stdout == ""
    lines = error_lines(done)
    assert len(lines) == 2 and "did not respond for 2 s; nothing was written" in lines[0], done.stderr
    assert not (tmp_path / "out").exists()


def test_a_killed_worker_ends_the_run_and_one_process_goes_on(torchrun: Torchrun, run: Run, twa: Twa, tmp_path: Path):
    """Kill a run while its output is being written: no partial output remains, and no measurement is repeated."""
    done = torchrun(2, "-m", "ckptavg", *twa, cwd=tmp_path, check=False, HOW="die at the end")
    assert done.returncode != 0 and done.stdout == ""
    assert len(error_lines(done)) == 2 and "nothing was written" in error_lines(done)[0], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.ckptavg"]
    done = run(*twa, "--report", "rest.json")
    assert done.returncode == 0, done.stderr
    whole = run(*twa, "-o", "whole", "--report", "whole.json")
    assert whole.returncode == 0, whole.stderr
    rest, all_ = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("rest", "whole"))
    assert rest["cost"]["forward_batches"] < all_["cost"]["forward_batches"] / 2
    # single precision: the sum of two half batches differs from that of a whole one
    for one, two in zip(rest["candidates"], all_["candidates"], strict=True):
        assert one["coefficient"] == pytest.approx(two["coefficient"], abs=1e-4)
