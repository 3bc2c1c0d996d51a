"""Every option is declared once: in all four places, and what a journal depends on."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run

import ckptavg
from ckptavg.declaration import PANELS, declared
from ckptavg.errors import UsageError
from ckptavg.options import Options
from ckptavg.options.follow import FOLLOW
from ckptavg.options.search import SearchOptions
from ckptavg.options.task import TaskOptions

TASK = """
import torch
from torch import nn
def model(): return nn.Linear(3, 2)
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
def metric(model, batch): return (model(batch[0]).argmax(dim=1) == batch[1]).float()
metric_bounds = (0.0, 1.0)
def val_dataloader():
    draws = torch.Generator().manual_seed(3)
    inputs = torch.randn(40, 3, generator=draws)
    return [(part, (part[:, 0] > 0).long()) for part in inputs.split(10)]
"""
# a value other than the default, and whether the option may need a folder as output
FREE: dict[str, list[Any]] = {
    "task_timeout": [100], "score_timeout": [5], "component": ["x.pt"], "step_from": [r"(\d+)"],
    "include": ["*"], "exclude": ["zzz"], "start": [0], "stop": [99],
    "window": [99], "every": [1], "output": ["elsewhere"], "force": [], "never_worse": [], "max_shard_size": ["5GB"],
    "format": ["dcp"], "device": ["cpu"], "parallel": ["batches"], "skip_bad": [], "wait_stable": [0], "dry_run": [],
    "resume": ["--no-resume"], "keep_journal": [], "baselines": ["--no-baselines"], "digests": ["--digests", "none"],
    "worker_timeout": [5], "score_jobs": [2], "keep_failed": [], "log_to": ["tensorboard:runs"],
}  # fmt: skip
REFUSED: dict[str, tuple[list[Any], str]] = {
    "task": (["other.py"], "task"), "last": ([3], "candidates"), "precision": (["bfloat16"], "precision"),
    "seed": ([1], "seed"), "deterministic": ([], "deterministic"), "bits": ([8], "bits"),
    "group_size": ([64], "group_size"), "offload": (["disk"], "offload"), "compile": ([], "compile"),
    "holdout": ([0.5], "holdout"), "dtype": (["float64"], "dtype"), "key": (["state_dict"], "key"),
    "score_key": (["x"], "score_key"), "score_goal": (["min"], "score_goal"), "batch_size": ([8], "batch_size"),
    "trust_remote_code": ([], "trust_remote_code"), "allow_nonfinite": ([], "allow_nonfinite"),
    "keep": (["bias"], "keep"), "average": (["bias"], "average"),
    "val": (["other.jsonl"], "data"), "train": (["other.jsonl"], "data"), "test": (["other.jsonl"], "data"),
}  # fmt: skip
# those that need other candidates, a library or several processes: their place in the journal's first line is checked
STORED: dict[str, dict[str, Any]] = {
    "score_cmd": {"score_cmd": "x"}, "lm_eval": {"lm_eval": "x"}, "adapter": {"adapter": "exact"},
    "rank": {"rank": 2, "adapter": "exact"}, "labels": {"val": "x", "labels": "a,b"},
    "max_length": {"val": "x", "max_length": 9}, "base": {"val": "x", "base": "b"}, "shard": {"shard": True},
}  # fmt: skip
DATA = ("val", "train", "test")  # compared by content, like the task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ckpts").mkdir()
    for step in range(1, 5):
        torch.manual_seed(step)
        file = tmp_path / "ckpts" / f"step-{step}" / "x.pt"
        file.parent.mkdir()
        torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict()}, file)
        os.utime(file, (0, 0))
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "other.py").write_text(TASK + "x = 1\n")
    return tmp_path


def test_every_option_is_tried_below():
    names = [option.name for option in declared(Options)]
    assert sorted([*FREE, *REFUSED, *STORED, *FOLLOW]) == sorted(names) and len(set(names)) == len(names)
    compared_by_content = {"task", *DATA, "last", "precision"}
    for option in declared(Options):
        changes = option.name in {*REFUSED, *STORED} - compared_by_content
        assert option.help.changes_measurements == changes, option.name
        assert option.help.panel in PANELS


def words(name: str, values: list[Any]) -> list[Any]:
    if values and str(values[0]).startswith("--"):
        return values
    return [f"--{name.replace('_', '-')}", *values]


@pytest.mark.parametrize("name", sorted(FREE))
def test_an_option_that_changes_no_measurement_goes_on_from_any_journal(run: Run, folder: Path, name: str):
    base = ("soup", "ckpts", "--task", "task.py", "--keep-journal", "--json")
    place = "out/" if name == "max_shard_size" else "out"
    assert run(*base, "-o", place).returncode == 0
    journal = folder / "out.ckptavg" / "journal.jsonl"
    before = journal.read_bytes()
    shutil.rmtree(folder / "out") if place == "out/" else (folder / "out").unlink()
    changed = (*base, "-o", place, *words(name, FREE[name]))
    done = run(*changed)
    assert done.returncode == 0, done.stderr
    fresh = run(*changed, "--no-resume", *(() if name == "dry_run" else ("--force",)))
    assert fresh.returncode == 0, fresh.stderr
    mine, other = json.loads(done.stdout), json.loads(fresh.stdout)
    for report in (mine, other):
        for key in ("run", "cost", "warnings"):
            report.pop(key, None)
    assert mine == other
    if name not in ("output", "resume", "dry_run", "baselines"):
        assert b"score " in before and "of an interrupted run; the cost counts new" in done.stderr


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in DATA])
def test_an_option_that_changes_measurements_refuses_the_journal_by_name(run: Run, folder: Path, name: str):
    base = ("soup", "ckpts", "-o", "out", "--keep-journal")
    assert run(*base, "--task", "task.py").returncode == 0
    values, named = REFUSED[name]
    given = words(name, values) if name == "task" else ["--task", "task.py", *words(name, values)]
    done = run(*base, "--force", *given)
    assert done.returncode == 6 and f"was left by a different run: {named}" in done.stderr, done.stderr


@pytest.mark.parametrize("name", sorted(STORED))
def test_other_settings_of_a_measurement_are_in_the_journals_first_line(name: str):
    """A first line that differs is refused with the name: see tests/journal/test_resume.py."""
    assert name in SearchOptions.__dataclass_fields__ or Options(**STORED[name]).measured() != Options().measured()
    assert name in Options().measured()


def test_data_are_compared_by_content(tmp_path: Path):
    from ckptavg.journal.fingerprint import fingerprint

    (tmp_path / "a").write_text("1")
    first = fingerprint((), {}, None, {"val": tmp_path / "a"})
    assert first != fingerprint((), {}, None, {"test": tmp_path / "a"})  # the same file in another role
    (tmp_path / "a").write_text("2")
    second = fingerprint((), {}, None, {"val": tmp_path / "a"})
    assert {name for name in first if first[name] != second[name]} == {"data"}


NEW = """
    shiny: Annotated[
        int, Help(SEARCH, "How much it shines.", "At least once.", "N", limit=AT_LEAST_1)
    ] = 7
"""


def test_a_new_option_is_one_edit(tmp_path: Path):
    """An option that is added to a copy is in the help page, the Python signature, its docstring and the reference."""
    root = Path(ckptavg.__file__).parents[1]
    shutil.copytree(root / "ckptavg", tmp_path / "ckptavg", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "scripts").mkdir()
    shutil.copy(root / "scripts" / "option_tables.py", tmp_path / "scripts")
    path = tmp_path / "ckptavg" / "options" / "search.py"
    text = path.read_text()
    path.write_text(text.replace("\n    def __post_init__", NEW + "\n    def __post_init__", 1))
    look = (
        "import ckptavg, inspect, runpy; f = ckptavg.swa; print(inspect.signature(f).parameters['shiny'].default);"
        "print(f.__doc__); print(runpy.run_path('scripts/option_tables.py')['panels']());"
        "from ckptavg.options import Options; print(Options().measured()['shiny'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "120"}
    python = [sys.executable, "-P"]
    seen = subprocess.run([*python, "-c", look], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.startswith("7\n") and seen.stdout.endswith("7\n")
    assert "    shiny: How much it shines. At least once." in seen.stdout
    assert "| `--shiny` | `7` | How much it shines. At least once. |" in seen.stdout
    page = subprocess.run(
        [*python, "-m", "ckptavg", "swa", "--help-all"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "--shiny" in page.stdout and "How much it shines. [default: 7]" in page.stdout
    bad = subprocess.run(
        [*python, "-m", "ckptavg", "swa", "x", "--shiny", "0"], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert bad.returncode == 2 and "--shiny must be at least 1, not 0" in bad.stderr


@pytest.mark.parametrize("option", declared(TaskOptions), ids=lambda option: option.name)
def test_an_option_is_validated_where_it_is_declared(option: Any):
    if option.choices:
        with pytest.raises(UsageError, match=rf"^{option.flag} must be one of .*, not nonsense$"):
            TaskOptions(**{option.name: "nonsense"})
    elif option.help.limit:
        with pytest.raises(UsageError, match=rf"^{option.flag} must be {option.help.limit.text}, not -1$"):
            TaskOptions(**{option.name: -1})
    elif option.kind is not bool:
        with pytest.raises(UsageError, match=f"^{option.flag} has a NUL character in it$"):
            TaskOptions(**{option.name: "a\0b"})


def test_docstrings_and_signatures_have_every_option():
    for option in declared(Options):
        for function in (ckptavg.twa, ckptavg.aswa):
            given = function.__name__ == "aswa" or option.name not in FOLLOW
            assert (option.name in inspect.signature(function).parameters) == given
            assert (f"\n    {option.name}: {option.help.text[:20]}" in str(function.__doc__)) == given, option.name
