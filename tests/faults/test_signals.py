"""SIGINT, SIGTERM and SIGUSR1: the first ends a run at the next micro-batch with exit code 75, a second at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from faults import job
from faults.warm import TESTS, Warm

TASK = Path(job.__file__)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def real(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a real process from its first instruction, as the leader of its own process group."""
    paths = os.pathsep.join(map(str, (cwd, TESTS.parent, TESTS)))
    return subprocess.Popen(
        [sys.executable, "-m", "ckptavg", *map(str, arguments)], cwd=cwd, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def until(path: Path, size: int, process: subprocess.Popen[str]) -> None:
    """Wait until a file has that many bytes."""
    while not path.exists() or path.stat().st_size < size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def alive(group: int) -> list[str]:
    """Return the live processes of a group, without zombies."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] if int(its) == group and state != "Z" else []
    return found


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("command", ["aswa", "twa --epochs 3", "sewa --solver quadratic --k 3"])
def test_the_first_signal_ends_the_run_at_the_next_batch_and_it_resumes(
    warm: Warm, ckpts: Path, tmp_path: Path, number: signal.Signals, command: str
):
    name, *options = command.split()
    arguments = (name, ckpts, "--task", TASK, "-o", "out", *options)
    log = tmp_path / "log"
    stop = 40 if "quadratic" in command else 20  # after the first score
    done = warm.run(*arguments, cwd=tmp_path, LOG=str(log), STOP=f"{stop}:{number.name}")
    assert (done.code, done.out) == (75, ""), done.err
    error, hint = done.err.splitlines()[-2:]
    kept = r"[1-9]\d* (score|loss)(s|es)?( and \d+ loss(es)?)? (is|are) kept in out\.ckptavg/"
    assert error == "error: interrupted; nothing was written"
    assert re.fullmatch(rf"hint: {kept}; run the same command to resume", hint), hint
    assert log.stat().st_size == stop, "it went on"
    assert {path.name for path in tmp_path.iterdir()} == {"log", "out.ckptavg"}
    whole = tmp_path / "whole"
    assert warm.run(*arguments, cwd=tmp_path, LOG=str(whole)).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"log", "whole", "out"}


def test_completed_work_is_not_repeated_after_a_stop(warm: Warm, ckpts: Path, tmp_path: Path):
    arguments = ("aswa", ckpts, "--task", TASK, "-o")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert warm.run(*arguments, "a", cwd=tmp_path, LOG=str(whole)).code == 0
    for at in (4, 13, 8):
        assert warm.run(*arguments, "b", cwd=tmp_path, LOG=str(parts), STOP=f"{at}:SIGTERM").code == 75
    assert warm.run(*arguments, "b", cwd=tmp_path, LOG=str(parts)).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    repeated = len(parts.read_text()) - len(whole.read_text())
    assert repeated < 3 * (6 + 5), "at each stop, a pass over the validation data and the one for BatchNorm"


@pytest.mark.parametrize(("package", "command"), [("numpy", ["swa"]), ("torch", ["aswa", "--task", TASK])])
def test_a_signal_during_a_long_import_does_not_kill(tmp_path: Path, ckpts: Path, package: str, command: list[object]):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Early:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {package!r}:\n"
        "            os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.meta_path.insert(0, Early())\n"
    )
    process = real(*command, ckpts, cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 75 and "run the same command to resume" in err, err
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"sitecustomize.py"}


DEAF = """
import os, signal, time
from pathlib import Path
from faults.job import *

def loss(model, batch):
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        try:
            Path("deaf").write_text("x")
            time.sleep(1)
        except BaseException:
            pass
"""


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path, ckpts: Path, warm: Warm):
    (tmp_path / "mine.py").write_text(DEAF)
    process = real("aswa", ckpts, "--task", "mine.py", "-o", "out", cwd=tmp_path)
    until(tmp_path / "deaf", 1, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM  # 143 in a shell
    (tmp_path / "mine.py").write_text("from faults.job import *")
    done = warm.run("aswa", ckpts, "--task", "mine.py", "-o", "out", cwd=tmp_path)
    assert done.code == 0, done.err


def test_the_exit_code_in_a_shell_is_128_plus_the_signal(tmp_path: Path, ckpts: Path):
    twice = "os.kill(os.getpid(), signal.SIGUSR1)\n    " * 2
    (tmp_path / "mine.py").write_text(DEAF.replace("os.kill(os.getpid(), signal.SIGTERM)\n    ", twice))
    command = f"{sys.executable} -m ckptavg aswa {ckpts} --task mine.py; echo $?"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(128 + signal.SIGUSR1), done


def test_a_command_that_scores_is_not_waited_for_and_does_not_live_on(tmp_path: Path, ckpts: Path, warm: Warm):
    child = warm.start("best", ckpts, "--score-cmd", "echo $$ > pid; sleep 1000 #", "-o", "out", cwd=tmp_path)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    child.kill(signal.SIGTERM)
    assert child.wait().code == 75
    assert not alive(int((tmp_path / "pid").read_text()))
    assert {path.name for path in tmp_path.iterdir()} == {"pid"}


def test_a_signal_to_the_whole_group_ends_loaders_workers_quietly(tmp_path: Path, ckpts: Path):
    log = tmp_path / "log"
    process = real("twa", ckpts, "--task", TASK, "--epochs", 500, "-o", "out", cwd=tmp_path, LOG=str(log), WORKERS="2")
    until(log, 3, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 75 and "Traceback" not in err, err


def test_a_program_with_handlers_of_its_own_keeps_them(ckpts: Path, tmp_path: Path):
    import ckptavg

    seen: list[Any] = []
    before = signal.signal(signal.SIGUSR1, lambda *got: seen.append(got))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        ckptavg.swa(ckpts, output=tmp_path / "out")
        assert len(seen) == 1 and signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)
