"""The check that waits for a GPU, on the CPU and at tiny sizes, so that it cannot rot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"


def report(out: Path, to: Path) -> str:
    subprocess.run([sys.executable, SCRIPTS / "report.py", out, "--to", to], check=True)
    return to.read_text()


@pytest.mark.thorough
def test_every_part_runs_and_the_page_is_made(tmp_path: Path):
    out = tmp_path / "out"
    # the suite itself runs the tests marked gpu on the CPU; a few of them are enough here
    environment = {
        **os.environ,
        "OUT": str(out),
        "PYTHON": sys.executable,
        "PYTEST_ADDOPTS": "-k 'test_devices and bits'",
    }
    done = subprocess.run(
        [SCRIPTS / "check.sh", "--device", "cpu"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    assert [(part["part"], part["code"]) for part in parts] == [("tests", 0), ("process", 0), ("speed", 0)]
    figures = [json.loads(line) for line in (out / "speed.jsonl").read_text().splitlines()]
    assert len(figures) == 15 and all(figure["value"] > 0 for figure in figures)
    assert sum(path.stat().st_size for path in out.iterdir()) < 1 << 20 and len(list(out.iterdir())) < 12
    # a CPU's figures are none of a GPU
    assert "Nothing was measured yet" in report(out, tmp_path / "cpu.md")

    def as_if_by_cuda(path: Path) -> None:
        path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))

    as_if_by_cuda(out / "parts.jsonl")
    for figure in figures:  # ratios of a busy CPU may miss any goal, or none
        if figure["what"].startswith("a step of"):
            figure["ratio"] = 1.2 if "twa" in figure["what"] else 1.0
    (out / "speed.jsonl").write_text("".join(json.dumps(figure) + "\n" for figure in figures))
    page = report(out, tmp_path / "gpu.md")
    assert "passed, 0 failed" in page and "| pullback, 4 bits | N = 20" in page
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| a step of")}
    assert "**missed**" in rows["a step of twa"] and "| yes |" in rows["a step of sewa --samples 1"]
    (tmp_path / "gpu.md").write_text(page.replace("<!-- causes -->\n", "<!-- causes -->\n\nIt was slow.\n\n"))
    assert "It was slow." in report(out, tmp_path / "gpu.md")


def test_a_part_that_is_none_is_refused():
    done = subprocess.run([SCRIPTS / "check.sh", "quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "tests, process, speed" in done.stderr


def test_the_page_in_the_repository_is_the_scripts(tmp_path: Path):
    """As long as nothing was measured; measured figures are those of a machine that is not here."""
    page = (SCRIPTS.parents[1] / "docs" / "gpu.md").read_text()
    assert "Nothing was measured yet" not in page or page == report(tmp_path / "none", tmp_path / "gpu.md")
