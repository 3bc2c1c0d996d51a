"""The structure in the design document, checked against the source's syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TASK

import ckptavg

PACKAGE = Path(ckptavg.__file__).parent
# a module may import from its own layer and those below; from top to bottom as in the design
LAYERS = (
    ("__main__", "callbacks"),
    ("cli", "api"),
    ("pipeline",),
    ("strategies",),
    ("objective",),
    ("batches",),
    ("tasks", "report", "options", "context"),
    ("candidates", "average", "journal", "output", "loggers"),
    ("checkpoints",),
    ("readers",),
    ("filesystem", "surrogate", "cost"),
    ("runtime", "score", "declaration"),
    ("coefficients", "errors"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the modules imported anywhere in a file, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "ckptavg":
            found |= {f"ckptavg.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path):
    for module in imported(path):
        parts = module.split(".")
        if parts[0] == "ckptavg" and len(parts) > 1 and parts[1] != room(path):
            assert RANK[parts[1]] > RANK[room(path)], f"{room(path)} imports {module}"


def test_the_page_has_every_room_in_its_layer():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {
        name.removesuffix("/").removesuffix(".py"): int(layer) - 1
        for layer, names in re.findall(r"^\| (\d+) \| (`[^|]+`) \|", page, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", names)
    }
    assert rooms == RANK
    assert set(RANK) == {room(path) for path in sources()}


@pytest.mark.parametrize("path", sorted((PACKAGE / "strategies").glob("**/[a-z]*.py")), ids=lambda path: path.stem)
def test_a_strategy_sees_mathematics_only(path: Path):
    allowed = {"ckptavg.objective", "ckptavg.score", "ckptavg.coefficients", "ckptavg.errors", "torch", "cma", "numpy"}
    allowed |= {"ckptavg.objective.selection", "ckptavg.objective.output_losses"}
    allowed |= {f"ckptavg.surrogate.{part}" for part in ("cross_validation", "folds", "optimum", "subsets")}
    ours = {m for m in imported(path) if m.split(".")[0] not in sys.stdlib_module_names}
    assert {m for m in ours if not m.startswith("ckptavg.strategies.")} <= allowed


def test_reports_are_made_without_torch():
    for path in {*(PACKAGE / "report").glob("*.py")} - {PACKAGE / "report" / "interval.py"}:  # arithmetic of scores
        assert not any(module.split(".")[0] == "torch" for module in imported(path))


def test_click_is_never_imported():
    assert not any("click" in imported(path) for path in sources())


def loaded_by(*arguments: str, cwd: Path | None = None) -> set[str]:
    """Return the modules that a command loads, as reported by the interpreter."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ckptavg", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


# modules too slow to import for a command that only inspects
HEAVY = {
    "torch",
    "numpy",
    "transformers",
    "safetensors",
    "scipy",
    "sklearn",
    "matplotlib",
    "datasets",
    "pandas",
    "cma",
    "lightning",
}


@pytest.mark.parametrize("arguments", [("--help",), ("sewa", "--help"), ("compare", "--help"), ("--version",)])
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]):
    loaded = loaded_by(*arguments)
    assert "ckptavg.cli.app" in loaded and not HEAVY & loaded


def test_help_reads_no_checkpoint_and_draws_no_progress():
    assert not {"ckptavg.checkpoints.discover", "ckptavg.report.result", "rich.progress"} & loaded_by("--help")


def test_inspecting_safetensors_loads_nothing_heavy(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "step-1.safetensors")
    loaded = loaded_by("inspect", str(tmp_path))
    assert "ckptavg.checkpoints.discover" in loaded and not HEAVY & loaded


@pytest.mark.parametrize("command", ["swa", "lawa", "ema", "last", "wsm"])
def test_a_plain_average_loads_no_torch(tmp_path: Path, command: str):
    """Torch takes longer to import than gigabytes to average; scipy, which intervals need, as long as a small model."""
    from safetensors.numpy import save_file

    for step in (1, 2, 3):
        save_file({"w": np.full(3, step, np.float16)}, tmp_path / f"step-{step}.safetensors")
    settings = ["--k", "2"] if command == "lawa" else []
    loaded = loaded_by(command, str(tmp_path), "-o", str(tmp_path / "averaged.safetensors"), *settings, cwd=tmp_path)
    assert "ckptavg.average.weighted_sum" in loaded and not (HEAVY - {"numpy"}) & loaded


def test_importing_the_package_and_its_callbacks_loads_nothing_heavy():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import ckptavg.callbacks, sys; dir(ckptavg); print({*sys.modules} & {*sys.argv[1:]})",
            *HEAVY,
        ],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "set()\n"


LONG = {"unpickler.py"}  # one concept, kept whole


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_constructors_are_short(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300 or path.name in LONG
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, node.lineno  # self and seven more


WALK = """
import os, sys, traceback
from ckptavg.objective.scoring import Scoring

def seen(*_, **__):
    frames = [f for f in traceback.extract_stack()[:-1] if "/ckptavg/" in f.filename]
    with open("walk", "w") as file:
        file.write(" ".join(f.filename.rpartition("ckptavg/")[2] + ":" + f.name for f in frames))
    os._exit(0)

Scoring._measure = seen
from ckptavg.__main__ import main
main()
"""


def test_few_functions_lie_between_the_command_line_and_the_first_score(digits: Path, tmp_path: Path):
    """The page's list of them is the list that a run goes through."""
    words = ["sewa", digits, "--k", "5", "--last", "7", "--steps", "2", "--task", TASK]
    subprocess.run([sys.executable, "-c", WALK, *map(str, words)], cwd=tmp_path, capture_output=True, check=True)
    frames = (tmp_path / "walk").read_text().split()
    parsed, *between = [frame for frame in frames if not frame.startswith("__main__")]
    assert parsed == "cli/app.py:run" and len(between) <= 8, between
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d+\. `([\w/]+\.py)`: `(\w+)`", page, re.MULTILINE)
    assert [f"{file}:{name}" for file, name in listed] == between
