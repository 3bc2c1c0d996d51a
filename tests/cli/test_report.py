"""``ckptavg report`` and ``--report run.html``: the same page, and one line for a file that is no report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Job, Run


@pytest.fixture
def made(run: Run, jobs: dict[str, Job], tmp_path: Path) -> Path:
    """A directory with run.json and run.html of one run."""
    done = run(
        "swa", jobs["mlp"].folder, "--task", jobs["mlp"].task, "--report", "run.json", "--report", "run.html"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_the_command_makes_the_page_of_the_run_from_its_json(run: Run, made: Path):
    done = run("report", "run.json", "-o", "later.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, "later.html\n", "")
    assert (made / "later.html").read_bytes() == (made / "run.html").read_bytes()
    refused = run("report", "run.json", "-o", "later.html")
    assert refused.returncode == 6 and "--force replaces it" in refused.stderr
    assert run("report", "run.json", "-o", "later.html", "--force").returncode == 0


def test_several_runs_are_side_by_side(run: Run, made: Path):
    report = json.loads((made / "run.json").read_text())
    (made / "other.json").write_text(json.dumps({**report, "seed": 1}))
    assert run("report", "run.json", "other.json", "-o", "both.html").returncode == 0
    text = (made / "both.html").read_text()
    assert "2 runs of ckptavg side by side" in text and 'id="run-2"' in text and "What differs" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "is no report of ckptavg"),
        ("[1]", "is no report of ckptavg"),
        ('{"schema_version": true, "kind": 3}', "is a report of schema version True"),
        (
            '{"schema_version": 1, "kind": "average", "run": null}',
            "is no report of ckptavg: $: 'strategy' is a required",
        ),
        ('{"schema_version": 99, "kind": "average"}', "is a report of schema version 99; this ckptavg reads 1"),
        ('{"schema_version": 1, "kind": "average", "seed": NaN}', "is not valid JSON: NaN is not allowed"),
        ('{"schema_version": 1, "kind": "aver', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
)
def test_a_file_that_is_no_report_is_refused_in_one_line(run: Run, tmp_path: Path, text: str, words: str):
    (tmp_path / "x.json").write_text(text)
    done = run("report", "x.json", "-o", "x.html")
    assert done.returncode == 3 and done.stdout == ""
    first, *hint = done.stderr.splitlines()
    assert first.startswith("error: x.json: ") and words in first and all(line.startswith("hint: ") for line in hint)
    assert not (tmp_path / "x.html").exists()


def test_a_huge_a_missing_and_a_strange_file_are_refused(run: Run, tmp_path: Path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 30)
    done = run("report", "x.json", "-o", "x.html")
    assert done.returncode == 3 and "1073741824 bytes, more than" in done.stderr
    assert run("report", "missing.json", "-o", "x.html").returncode == 3
    wrong: Any = run("report", "x.json", "-o", "x.pdf")
    assert wrong.returncode == 2 and ".html or .md" in wrong.stderr
