"""Progress in a log: few whole lines, with the time left and the time taken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TASK

from ckptavg.cli.stage_log import StageLog

SLOW = """
import os, sys, time
sys.path.insert(0, os.environ["DEMO"])
from task import *
from task import loss as fast

def loss(model, batch):
    time.sleep(0.03)
    return fast(model, batch)
"""


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Log:
    """A log with the lines that were printed, and when."""

    def __init__(self) -> None:
        self.clock, self.lines = Clock(), list[tuple[float, str]]()
        self.stages = StageLog(lambda line: self.lines.append((self.clock.now, line)), self.clock)

    def run(self, stage: str, steps: int, seconds: float) -> None:
        """Report ``steps`` steps that take ``seconds`` each."""
        for step in range(steps):
            self.clock.now += seconds
            self.stages(stage, step + 1, steps, {"stage_left": (steps - step - 1) * seconds})


def test_stages_of_less_than_a_second_have_no_line():
    log = Log()
    for stage in "abcdefghij":
        log.run(stage, 20, 0.04)
    log.stages.close()
    assert log.lines == []


def test_a_stage_has_a_line_at_its_start_and_one_at_its_end():
    log = Log()
    log.run("scoring candidates", 20, 0.5)
    log.run("averaging", 3, 0.9)
    assert log.lines == [
        (1.0, "scoring candidates 2/20, about 10 s left in this stage"),
        (10.0, "scoring candidates 20/20, took 10.0 s"),
        (11.8, "averaging 2/3, about 5 s left in this stage"),
        (pytest.approx(12.7), "averaging 3/3, took 2.7 s"),
    ]


def test_a_long_stage_has_a_line_in_thirty_seconds():
    log = Log()
    log.run("training", 1000, 0.25)
    times = [when for when, _ in log.lines]
    assert times == [1.0, *(1.0 + 30 * i for i in range(1, 9)), 250.0]
    assert [line.split(", ")[1] for _, line in log.lines[:2]] == [
        "about 4 min left in this stage", "about 4 min left in this stage",
    ]  # fmt: skip
    assert log.lines[-1][1] == "training 1,000/1,000, took 4 min"


def test_a_stage_that_runs_for_every_candidate_is_named_once():
    log = Log()
    for i in range(20):
        log.run("scoring on val data", 10, 0.2)
        log.stages("walking through the candidates", i + 1, 20, {})
    assert len(log.lines) <= 6
    assert sum("scoring" in line for _, line in log.lines) <= 3  # its start and end, and one after 30 s
    assert log.lines[-1] == (pytest.approx(40.0), "walking through the candidates 20/20, took 38.0 s")


def test_a_search_that_stops_early_and_the_last_report_repeated_have_one_line():
    log = Log()
    log.run("learning", 2, 1.0)
    for _ in range(5):
        log.clock.now += 40
        log.stages("learning", 2, 2, {"left": 3.0})
    for step in range(3):
        log.clock.now += 1
        log.stages("swapping", step + 1, 100, {"left": 3.0})
    log.stages("no better swap", 0, 0, {})
    log.stages.close()
    log.stages.close()
    assert [line for _, line in log.lines] == [
        "learning 1/2, about 5 s left in this stage", "learning 2/2, took 2.0 s", "swapping 1/100, about 5 s left",
        "no better swap", "swapping ended at 3/100, took 3.0 s",
    ]  # fmt: skip


def test_a_strategy_that_has_finished_has_its_figures():
    log = Log()
    log.stages("best: result", 1, 1, {"val loss": 0.25, "passes": 40.0, "s": 0.2})
    log.stages("sewa: result", 1, 1, {"val loss": 0.25, "passes": 232.0, "s": 100.0})
    assert [line for _, line in log.lines] == ["sewa finished: val loss 0.25, passes 232, took 2 min"]


@pytest.mark.parametrize("command", ["best", "aswa"])
def test_a_log_of_a_real_run_has_whole_lines(digits: Path, tmp_path: Path, command: str):
    (tmp_path / "slow_task_of_a_log.py").write_text(SLOW)
    words = [command, digits, "--last", "3", "--task", "slow_task_of_a_log.py"]
    with (tmp_path / "log.txt").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "ckptavg", *map(str, words)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=log,
            env=environment(DEMO=str(TASK.parent)), check=False,
        )  # fmt: skip
    text = (tmp_path / "log.txt").read_bytes()
    assert done.returncode == 0, text.decode()
    assert done.stdout == b"averaged.safetensors\n"
    assert b"\r" not in text and b"\x1b" not in text
    lines = text.decode().splitlines()
    assert len([line for line in lines if re.search(r" \d+/\d+, |, took ", line)]) <= 8
    ends = [line for line in lines if ", took " in line]
    assert ends and all(re.fullmatch(r".* (\d+)/\1, took \d+\.\d s", line) for line in ends)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of this process, without colours that are forced."""
    return {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | more
