"""Directories as people have them: the right candidates in the right order, or an error whose ways out work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from directories import CASES, Case, table, write
from safetensors.numpy import load_file

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.errors import InputError


def value(checkpoint: Checkpoint) -> float:
    name = checkpoint.names[0]
    out = bytearray(checkpoint.spec(name).nbytes)
    checkpoint.read_into(name, 0, memoryview(out))
    return float(np.frombuffer(out, np.float32)[0])


def ways_out(hint: str) -> list[str]:
    """Return the options that a hint names."""
    option = r"--(?:include|exclude|component|step-from|key) (?:'[^']*'|[^\s(]\S*)"
    return re.findall(rf"{option}(?: {option})*", hint)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.error])
def test_the_candidates_are_the_right_ones_in_training_order(run: Run, tmp_path: Path, name: str):
    case = CASES[name]
    write(tmp_path / "run", case.files)
    paths = [tmp_path / "run" / path for path in case.paths]
    with discover(paths) as found:
        assert [value(one) for one in found.checkpoints] == pytest.approx(list(case.values))
        assert not case.steps or [one.step for one in found.checkpoints] == list(case.steps)
        assert not case.layout or found.layout == case.layout
    done = run("swa", *(f"run/{path}" for path in case.paths), "-o", "out.safetensors")
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out.safetensors")
    np.testing.assert_allclose(next(iter(written.values())), np.mean(case.values), rtol=1e-6)
    checked = run("verify", "out.safetensors", "--sources", "run")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.error])
def test_an_error_names_the_ways_out_and_each_of_them_works(run: Run, tmp_path: Path, name: str):
    case = CASES[name]
    write(tmp_path / "run", case.files)
    paths = [tmp_path / "run" / path for path in case.paths]
    with pytest.raises(InputError, match=case.error) as caught:
        discover(paths)
    hint = caught.value.hint or ""
    named = set(ways_out(hint))
    assert named <= {*case.ways, *(f"--exclude '{path}'" for path in case.paths)}, hint
    for way, values in case.ways.items():
        done = run(
            "swa", *(f"run/{path}" for path in case.paths), *shlex.split(way), "-o", "out.safetensors", "--force"
        )
        assert done.returncode == 0, done.stderr
        written = load_file(tmp_path / "out.safetensors")
        np.testing.assert_allclose(next(iter(written.values())), np.mean(values), rtol=1e-6)
    if hint.startswith("name "):
        for folder in shlex.split(hint.partition(": ")[2]):
            with discover([Path(folder)]) as found:
                assert len(found.checkpoints) == 2
    shown = run("inspect", *(f"run/{path}" for path in case.paths))
    assert "Traceback" not in shown.stderr and shown.returncode in (0, 3)


def test_the_last_of_a_way_out_is_the_newest(tmp_path: Path):
    """--step-from orders by the number that it finds."""
    case: Case = CASES["epoch and batch without words"]
    write(tmp_path, case.files)
    for way, values in case.ways.items():
        with discover([tmp_path], Window(step_from=shlex.split(way)[1])) as found:
            assert [value(one) for one in found.checkpoints] == list(values)


def test_the_table_in_the_documents_is_current():
    page = Path(__file__).parents[2] / "docs" / "directories.md"
    assert page.read_text().endswith(table()), "run python tests/directories.py"
