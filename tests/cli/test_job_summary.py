"""Summary of a GitHub job: appended, at most as long as GitHub takes, and never a reason to fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TASK, Run
from safetensors.torch import save_file

from ckptavg.cli import job_summary

HOSTILE = "step-1|<img src=x onerror=alert(1)>`**x**`.safetensors"


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for name, value in ((HOSTILE, 1.0), ("step-2.safetensors", 2.0)):
        save_file({"w": torch.full((3,), value)}, folder / name)
    return folder


def test_the_verdict_and_the_table_are_appended(digits: Path, tmp_path: Path, run: Run):
    file = tmp_path / "summary.md"
    file.write_text("of an earlier command\n")
    words = ("sewa", digits, "--k", 3, "--last", 5, "--steps", 5, "--task", TASK)
    done = run(*words, cwd=tmp_path, GITHUB_STEP_SUMMARY=str(file))
    assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert text.startswith("of an earlier command\n## ckptavg `sewa`\n\n**")
    verdict = next(line for line in text.splitlines() if line.startswith("**"))
    assert "on test data" in verdict
    assert "| **`sewa`, as written** |" in text.partition("<details>")[0]
    assert "To reproduce it" in text.partition("<details>")[2]


def test_a_line_without_an_end_stays_a_line_of_its_own(ckpts: Path, tmp_path: Path, run: Run):
    (tmp_path / "summary.md").write_text("no newline")
    assert run("swa", ckpts, cwd=tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md")).returncode == 0
    assert (tmp_path / "summary.md").read_text().startswith("no newline\n## ckptavg `swa`\n")


def test_names_are_no_markup(ckpts: Path, tmp_path: Path, run: Run):
    assert run("swa", ckpts, cwd=tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "new.md")).returncode == 0
    assert HOSTILE.replace("|", "\\|") in (tmp_path / "new.md").read_text()


@pytest.mark.parametrize("place", ["missing/summary.md", "", "ckpts", "full.md", "huge.md"])
def test_a_summary_that_cannot_be_written_is_one_warning(place: str, ckpts: Path, tmp_path: Path, run: Run):
    """The work is done: an unset variable, a missing directory and a full file change no exit code."""
    (tmp_path / "full.md").write_bytes(b"x" * job_summary.LIMIT)
    (tmp_path / "huge.md").write_bytes(b"x" * (job_summary.LIMIT - 450))
    done = run("swa", ckpts, cwd=tmp_path, GITHUB_STEP_SUMMARY=place and str(tmp_path / place))
    warnings = [line for line in done.stderr.splitlines() if "job summary" in line]
    assert done.returncode == 0 and done.stdout == "averaged.safetensors\n"
    assert len(warnings) == (place not in ("", "huge.md"))
    assert (tmp_path / "full.md").stat().st_size == job_summary.LIMIT
    if place == "huge.md":  # room for the verdict alone
        text = (tmp_path / "huge.md").read_text().lstrip("x")
        assert "longer than a job summary" in text and "<details>" not in text
        assert (tmp_path / "huge.md").stat().st_size <= job_summary.LIMIT
    assert not (tmp_path / "missing").exists()


def test_an_error_of_the_run_appends_nothing(tmp_path: Path, run: Run):
    assert run("swa", tmp_path, cwd=tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md")).returncode == 3
    assert not (tmp_path / "summary.md").exists()
