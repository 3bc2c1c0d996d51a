"""Each hostile input gives its exit code and one line that names it, within limits, and leaves no files behind."""

from __future__ import annotations

import os
from typing import Any

import pytest

from hostile.case import Case
from hostile.corpus import corpus
from hostile.jail import faults


@pytest.mark.parametrize("name", corpus())
def test_a_hostile_input_gives_one_line_and_no_files(answers: dict[str, dict[str, Any]], name: str) -> None:
    case = corpus()[name]
    if case.nobody and os.geteuid():
        pytest.skip("only root can run as nobody")
    assert not faults(case, answers[name])


def test_there_are_enough_of_every_kind() -> None:
    cases = corpus().values()
    assert sum(not case.tree for case in cases) >= 300
    assert sum(case.tree for case in cases) >= 80
    assert sum(case.payload for case in cases) >= 40


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"signal": "SIGSEGV"}, "crash"),
        ({"signal": "SIGALRM"}, "hang"),
        ({"err": "error: x\nerror: y\n"}, "2 error lines"),
        ({"err": "error: x: bad\nwhat\n"}, "more than a hint"),
        ({"err": "Traceback\nerror: x: bad\n"}, "a traceback"),
        ({"err": "error: y: bad\n"}, "is not named"),
        ({"err": "error: x: good\n"}, "is not in"),
        ({"code": 1}, "exit code 1, not 3"),
        ({"seen": ["os.system"]}, "code run: os.system"),
        ({"cpu": 6.0}, "took 6.0 s"),
        ({"memory": 2 << 30}, "took 2048 MiB"),
        ({"new": ["ran"]}, "code run"),
        ({"gone": ["x"]}, "gone"),
        ({}, ""),
    ],
)
def test_the_judge_detects_violations(answer: dict[str, Any], expected: str) -> None:
    good = {"code": 3, "out": "", "err": "error: x: bad\nhint: y\n", "seen": [], "cpu": 0.0, "memory": 0}
    run = good | {key: value for key, value in answer.items() if key in good}
    whole = {"runs": [run], "new": [], "gone": [], **{k: v for k, v in answer.items() if k not in good}}
    found = faults(Case(id="x", build=print, at="x", message="bad", quick=True), whole)
    assert (not found) if not expected else any(expected in fault for fault in found), found
