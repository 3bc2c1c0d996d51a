"""Run cases in workers, restart a worker when it dies, and judge the results."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hostile.case import Case

WORKERS = 2
CPU = 5.0  # limit on CPU seconds per command, at the speed of the machine for which the limit was set
MEMORY = 1 << 30
_TESTS = Path(__file__).parent.parent


def run_all(cases: Sequence[Case], base: Path) -> dict[str, dict[str, Any]]:
    """Return case → the worker's answer, or ``{"signal": ...}`` if the case killed the worker."""
    with ThreadPoolExecutor(WORKERS) as pool:
        parts = pool.map(lambda part: _run(part, base), [cases[i::WORKERS] for i in range(WORKERS)])
        return {name: answer for part in parts for name, answer in part.items()}


def _run(cases: Iterable[Case], base: Path) -> dict[str, dict[str, Any]]:
    left = [case.id for case in cases]
    answers: dict[str, dict[str, Any]] = {}
    while left:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "hostile.worker", str(base)]
        pipe = subprocess.PIPE
        worker = subprocess.Popen(command, cwd=_TESTS, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert worker.stdin and worker.stdout
        current = ""
        for name in list(left):
            try:
                worker.stdin.write(f"{name}\n")
                worker.stdin.flush()
            except BrokenPipeError:
                break
            current = worker.stdout.readline().removeprefix("> ").rstrip("\n")
            answer = worker.stdout.readline()
            if not answer:
                break
            answers[name] = json.loads(answer)
            left.remove(name)
        worker.stdin.close()
        worker.stdout.close()
        code = worker.wait()
        if left:
            assert current == left[0], f"a worker ended with {code} before it began with {left[0]}"
            answers[current] = {"signal": signal.Signals(-code).name if code < 0 else f"exit {code}"}
            left.remove(current)
    return answers


def faults(case: Case, answer: dict[str, Any]) -> list[str]:
    """Return the violations in an answer; empty if there are none."""
    if "signal" in answer:
        return [("hang" if answer["signal"] == "SIGALRM" else "crash") + f": {answer['signal']}"]
    found: list[str] = []
    for command, code, run in zip(("inspect", "swa"), (case.inspect, case.code), answer["runs"], strict=False):
        found += [f"{command}: {fault}" for fault in _faults(case, command, code, run)]
    written = ["out.safetensors"] if case.code == 0 and not case.quick else []
    if answer["new"] != written or answer["gone"]:
        found.append(f"files: new {answer['new']}, gone {answer['gone']}")
    if "ran" in answer["new"]:
        found.append("code run: the payload made its file")
    return found


def _faults(case: Case, command: str, code: int, run: dict[str, Any]) -> Iterable[str]:
    if run["seen"]:
        yield f"code run: {', '.join(run['seen'])}"
    if run["code"] != code:
        yield f"exit code {run['code']}, not {code}: {run['err'][-300:]!r}"
    if "Traceback" in run["out"] + run["err"]:
        yield "a traceback"
    if run["cpu"] > CPU:
        yield f"took {run['cpu']:.1f} s"
    if run["memory"] > MEMORY:
        yield f"took {run['memory'] >> 20} MiB"
    lines = run["err"].rstrip("\n").split("\n")
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != (code != 0):
        yield f"{len(errors)} error lines"
    if errors and not (lines[-1] is errors[-1] or (lines[-2] is errors[-1] and lines[-1].startswith("hint: "))):
        yield "more than a hint after the error"
    yield from _line_faults(case, command, code, run, errors)


def _line_faults(case: Case, command: str, code: int, run: dict[str, Any], errors: list[str]) -> Iterable[str]:
    """Yield the ways in which the error line differs from the expected one."""
    if code == 0:
        shown = run["out"] + run["err"]
        if (command == "swa" or case.quick) and not re.search(case.message, shown):
            yield f"{case.message!r} is not in {shown[-500:]!r}"
        return
    lines_with_paths = [line for line in run["out"].split("\n") if line.startswith("left out ")] + errors
    line = next((line for line in lines_with_paths if case.at in line), "")
    if not line:
        yield f"{case.at!r} is not named in {lines_with_paths}"
    elif not re.search(case.message, line):
        yield f"{case.message!r} is not in {line!r}"
    elif len(line) > 1500:
        yield f"a line of {len(line)} characters"


def counts(cases: Sequence[Case], answers: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return the counts that the tests print at the end."""
    wrong = {case.id: faults(case, answers[case.id]) for case in cases}

    def having(word: str) -> int:
        return sum(any(word in fault for fault in found) for found in wrong.values())

    return {
        "files": sum(not case.tree for case in cases), "directories": sum(case.tree for case in cases),
        "payloads": sum(case.payload for case in cases), "crashes": having("crash: "), "hangs": having("hang: "),
        "code runs": having("code run: "), "tracebacks": having("a traceback"), "litter": having("files: "),
        "other faults": sum(bool(found) for found in wrong.values()),
    }  # fmt: skip
