"""The benchmarks run; at sizes at which their figures mean nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "benchmark"))
import page
import processes
import start

SCRIPTS = Path(page.__file__).parent
NAMES = list(page.TABLES)
QUICK = ("reads", "lowbit", "adapters")


def run(folder: Path, *tables: str) -> str:
    """Return the page with these tables, at small sizes."""
    words = ["page.py", "--quick", "--folder", str(folder), "-o", str(folder / "page.md"), *tables]
    done = subprocess.run([sys.executable, *words], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "page.md").read_text()


def test_a_page_has_the_tables_that_were_measured(tmp_path: Path):
    text = run(tmp_path, *QUICK)
    assert text.count("Not run.") == len(NAMES) - len(QUICK) and "{{" not in text
    rows = [line.split() for line in text.splitlines() if line.startswith("ckptavg swa ")]
    assert [len(row) for row in rows] == [10]  # the name in two words, and eight figures
    assert re.search(r"^\| ckptavg swa, 3 × .* MB \| ≤ 0.45 s \| ", text, re.MULTILINE)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["reference", "cold", "sharded", "safety-cold", "start", "step", "evaluation", "busy", "many", "solver"]
)
def test_a_table(name: str, tmp_path: Path):
    if not (SCRIPTS / page.TABLES[name].command.split()[0]).exists():
        pytest.skip("no such script")
    assert f"scripts/benchmark/{name}.py" in run(tmp_path, name) or name not in {
        path.stem for path in SCRIPTS.iterdir()
    }


def test_the_text_has_a_place_for_every_table():
    places = re.findall(r"\{\{(.*?)\}\}", (SCRIPTS / "page.md.in").read_text(encoding="utf-8"))
    assert sorted(places) == sorted([*NAMES, "targets", "machine", "minutes"])


def test_ratios_are_of_the_same_round():
    """Compare two runs of a with the first two of b: 1/2 and 2/4, though the medians are 1.5 and 4."""
    runs = {"a": [1, 2], "b": [2, 4, 8]}
    assert processes.ratio({k: [processes.Used(s, 0, 0, 0) for s in v] for k, v in runs.items()}, "a", "b") == 0.5


def test_a_process_is_measured_with_its_children():
    used = processes.measure(f"true; {sys.executable} -c 'x = bytes(10**8); sum(range(10**6))'")
    assert used.peak > 100 and used.processor > 0
    assert processes.measure("echo 2.5 1.5")[:2] == (2.5, 1.5)
    with pytest.raises(SystemExit, match=r"failed with 3.*\n.*no such thing"):
        processes.measure("echo no such thing >&2; exit 3")


def test_import_times_are_of_the_outermost_imports():
    """Read the times of: b imports a.x, whose package a imports c; then a.y is imported."""
    text = """import time: self [us] | cumulative | imported package
import time:        10 |         10 |     c
import time:        20 |         30 |   a
import time:        10 |         10 |   a.x
import time:       100 |        140 | b
import time:         5 |          5 | a.y
"""
    assert start.importtime(text) == {"b": (0.1, 0.14), "a": (0.035, 0.045), "c": (0.01, 0.01)}


def test_intervals():
    words = ["intervals.py", "--quick", "--methods"]
    done = subprocess.run([sys.executable, *words], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    figures = {line[:32].strip(): line[32:].split() for line in lines[1:] if line[32:38].strip().isdigit()}
    assert 92 <= float(figures["0.8/0.78 independent"][2]) <= 98 and len(figures["0.8/0.78 independent"]) == 12
    assert figures["0.99/0.985 few discordant"] == ["100", "0"] and len(figures["batches of 16, F1"]) == 4


@pytest.mark.parametrize("candidates", [10, 100])
def test_default_answers_pass_their_gates(candidates: int):
    words = ["answers.py", "--candidates", str(candidates), "--seeds", "1", "--starts", "4"]
    done = subprocess.run([sys.executable, *words], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line[:4] for line in done.stdout.splitlines()[-5:]] == ["PASS"] * 5, done.stdout
