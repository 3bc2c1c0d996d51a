"""CONTRIBUTING.md is literally correct: its files, added to a copy of the package as printed, pass all checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FILES = dict(
    re.findall(
        r"`([a-z_/]+\.py)`:\n\n<!-- run by: tests/test_contributing\.py -->\n```python\n(.*?)```",
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
)
STRATEGY, FORMAT, SAMPLE = "ckptavg/strategies/linear.py", "ckptavg/readers/npy.py", "tests/readers/sample_npy.py"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository and add the files that the page prints; existing files are not changed."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("ckptavg", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    for name, text in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def arrays(tmp_path: Path) -> Iterator[Path]:
    """Write two checkpoints with NumPy."""
    (tmp_path / "ckpts").mkdir()
    for step in (1, 2):
        np.save(tmp_path / "ckpts" / f"step-{step}.npy", np.full((2, 3), step, dtype="<f4"))
    yield tmp_path / "ckpts"


def python(copy: Path, *arguments: object, cwd: Path | None = None) -> str:
    """Run Python with the copy of the package; return stdout."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, *map(str, arguments)]
    done = subprocess.run(words, cwd=cwd or copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_prints_three_files():
    assert list(FILES) == [STRATEGY, FORMAT, SAMPLE]


@pytest.mark.thorough
def test_the_strategy_is_a_command_and_the_format_is_read(copy: Path, arrays: Path, tmp_path: Path):
    shown = python(copy, "-m", "ckptavg", "inspect", arrays, cwd=tmp_path)
    assert re.search(r"step-2\.npy +2 +npy", shown), shown
    assert "--power" in python(copy, "-m", "ckptavg", "linear", "--help")
    for command, weight in ((("linear", "--power", 2), 1.8), (("swa",), 1.5)):
        output = tmp_path / f"{command[0]}.safetensors"
        name, *options = command
        python(copy, "-m", "ckptavg", name, arrays, *options, "-o", output, cwd=tmp_path)
        torch.testing.assert_close(load_file(output)["array"], torch.full((2, 3), weight))


def test_a_file_of_the_format_is_found_in_a_directory_of_its_own(copy: Path, arrays: Path, tmp_path: Path):
    for path in list(arrays.iterdir()):
        (arrays / path.stem).mkdir()
        path.rename(arrays / path.stem / "model.npy")
    assert len(re.findall(r" npy ", python(copy, "-m", "ckptavg", "inspect", arrays, cwd=tmp_path))) == 2


@pytest.mark.thorough
@pytest.mark.parametrize("tool", ["ruff check", "ruff format --check", "basedpyright --pythonpath PYTHON"])
def test_lint_format_and_types_are_clean(copy: Path, tool: str):
    words = tool.replace("PYTHON", sys.executable).split()
    files = [name for name in FILES if words[0] == "ruff" or name.startswith("ckptavg/")]
    python(copy, "-m", *words, *files)


@pytest.mark.thorough
def test_the_contract_and_document_tests_hold_with_the_new_files(copy: Path):
    """Run the tests that cover all strategies and formats, and those that compare them with the documents."""
    files = [
        "tests/readers/test_contract.py", "tests/strategies/test_contract.py", "tests/test_architecture.py",
        "tests/test_docs.py",
    ]  # fmt: skip
    told = python(
        copy,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *files,
        "-k",
        "npy or linear or in_the_reference or claimed or distinct",
    )
    counted = re.search(r"(\d+) passed", told)
    assert counted and int(counted[1]) >= 20 and "failed" not in told
