"""The notebook of the documents runs, and its committed outputs are those of a run that went well."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def kinds(notebook: Any) -> list[list[str]]:
    """Return the kinds of data that each cell shows."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [[kind for output in cell.outputs for kind in output.get("data", {"text": ""})] for cell in cells]


def test_the_committed_outputs_have_no_error_and_no_absolute_path():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    texts = [str(output.get("text", "")) + str({**output.get("data", {}), "image/png": ""}) for output in outputs]
    assert not [text for text in texts if re.search(r"(?<![\w<])/(home|root|tmp|work|Users|var|usr)/", text)]
    assert NOTEBOOK.stat().st_size < 400_000


@pytest.mark.thorough  # it needs pandas too
def test_it_runs_and_shows_what_is_committed(tmp_path: Path):
    output = tmp_path / "executed.ipynb"
    words = [sys.executable, ROOT / "scripts" / "site" / "run_notebook.py", output]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kinds(nbformat.read(output, as_version=4)) == kinds(nbformat.read(NOTEBOOK, as_version=4))
