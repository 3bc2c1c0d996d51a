"""The benchmarks run; at sizes at which their figures mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmark"


def test_low_bits():
    words = ["lowbit.py", "--candidates", "3", "--parameters", "1000", "--rounds", "1", "--threads", "1"]
    done = subprocess.run([sys.executable, *words], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bits = [line.split()[0] for line in done.stdout.splitlines() if " bits " in line]
    assert bits == ["authors'", "32", "16", "8", "4", "2", "1"]


def test_intervals():
    words = ["intervals.py", "--quick", "--methods"]
    done = subprocess.run([sys.executable, *words], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    figures = {line[:32].strip(): line[32:].split() for line in lines[1:] if line[32:38].strip().isdigit()}
    assert 92 <= float(figures["0.8/0.78 independent"][2]) <= 98 and len(figures["0.8/0.78 independent"]) == 12
    assert figures["0.99/0.985 few discordant"] == ["100", "0"] and len(figures["batches of 16, F1"]) == 4


@pytest.mark.thorough
def test_a_busy_machine():
    words = ["busy.py", "--rounds", "1", "--loops", "1", "--policies", "--steps", "1"]
    words += ["--networks", "demo's network", "--arguments=--dry-run"]
    done = subprocess.run([sys.executable, *words], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ")[1] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert rows == 2 * ["ckptavg's (10000)", "libgomp's (300000)"]


@pytest.mark.parametrize("candidates", [10, 100])
def test_default_answers_pass_their_gates(candidates: int):
    words = ["answers.py", "--candidates", str(candidates), "--seeds", "1", "--starts", "4"]
    done = subprocess.run([sys.executable, *words], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line[:4] for line in done.stdout.splitlines()[-5:]] == ["PASS"] * 5, done.stdout
