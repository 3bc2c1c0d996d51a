"""Random arguments succeed or fail with a documented exit code, and a failed command leaves no files."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from safetensors.torch import save_file

from ckptavg.cli.app import app
from ckptavg.strategies import strategies

TASK = """
import torch
from torch import nn
def model(): return nn.Linear(3, 2)
def loss(model, batch): return model(batch).square().mean(dim=1)
def val_dataloader(): return [torch.ones(8, 3)]
"""
ODD = (
    "", "0", "1", "2", "3", "-1", "+1", "1_0", "4.0", "0.5", "1e-9", "nan", "inf", "-inf", "1e400", "9" * 20,
    "-" + "9" * 20, "9" * 5000, "١٢", "²", "x", "auto", "None", "true", "[", "*", "**", "[!", "../..", "/", "~", "a,b",
    ",", "5GB", "-5GB", "0B", "1e9GB", "GB", "val", "train", "last,swa", "sewa:k=2", "sewa:k=x", "sewa:", "twa:lr=nan",
    "\x1b[31m", "[/foo]", "é", "\udcff", "x" * 300, "--", "-", "@file", "%s", "{}", "{dir}", "ckpts", "mine.py",
    "/dev/null", "cpu", "meta", "cuda:99", "bfloat16", "int8", "exact", "min", "\n", " ",
)  # fmt: skip
FEW = ("0", "1", "2", "-1", "x", "", "nan", "0.5", "²", "auto")  # for options that repeat work or wait
REPEATED = {"k", "steps", "epochs", "evaluations", "samples", "grid", "verify", "patience", "wait_stable", "draws"}
NOT_RUN = {"lm_eval", "verbose", "help", "follow"}  # a large library; tracebacks; waits for a training to end
SCORED = ("sewa", "twa", "aswa", "soup", "best", "compare", "landscape", "eval")


def words(rng: random.Random) -> list[str]:
    """Return a command with up to four of its options, mostly with odd values."""
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = rng.choice([*sorted(set(commands) - {"demo", "env", "init", "verify"})])
    options = [
        param for param in commands[name].params if param.param_type_name == "option" and param.name not in NOT_RUN
    ]
    found = [name, rng.choice(("ckpts", "ckpts", "ckpts", rng.choice(ODD)))]
    for option in rng.sample(options, min(len(options), rng.randrange(5))):
        found.append(rng.choice([*option.opts, *option.secondary_opts]))
        if not option.is_flag:
            found.append(rng.choice(FEW if option.name in REPEATED else ODD))
    if name in SCORED and not {"--task", "--val", "--score-cmd"} & set(found):
        found += ["--task", "mine.py"]
    by_scores = "--score-cmd" in found  # other solvers' settings are refused
    short = [("--evaluations", "2")] if by_scores else [("--steps", "1"), ("--epochs", "1")]
    for option, value in (*short, ("--samples", "3"), ("--grid", "2")):
        if option not in found and any(option in param.opts for param in options):
            found += [option, value]
    return found


def folder(tmp_path: Path) -> Path:
    (tmp_path / "ckpts").mkdir()
    for step in (1, 2, 3):
        save_file({"weight": torch.full((2, 3), float(step)), "bias": torch.zeros(2)},
                  tmp_path / "ckpts" / f"step-{step}.safetensors")  # fmt: skip
    (tmp_path / "mine.py").write_text(TASK)
    return tmp_path


@pytest.mark.parametrize("name", [name for name, one in strategies().items() if "k" in one.__annotations__])
def test_a_setting_of_one_letter_has_a_short_option(run: Run, tmp_path: Path, name: str) -> None:
    """``-k 2``, ``-k2`` and ``--k 2`` give the same bytes, ``-k 1`` other bytes."""
    folder(tmp_path)
    for number, words in enumerate((("-k", 2), ("-k2",), ("--k", 2), ("-k", 1))):
        done = run(name, "ckpts", *words, "--task", "mine.py", "-o", f"{number}.safetensors")
        assert done.returncode == 0, done.stderr
    short, joined, long, other = ((tmp_path / f"{number}.safetensors").read_bytes() for number in range(4))
    assert short == joined == long != other


def test_any_arguments(run: Run, tmp_path: Path) -> None:
    folder(tmp_path)
    before = {*tmp_path.iterdir(), tmp_path / "__pycache__"}

    @examples(80)
    @given(st.integers(0, 2**64))
    def check(seed: int) -> None:
        arguments = words(random.Random(seed))
        done = run(*arguments)
        assert done.returncode in (0, 2, 3, 4, 5, 6, 7, 8), (arguments, done.stderr)
        assert "Traceback" not in done.stderr and "bug in ckptavg" not in done.stderr, (arguments, done.stderr)
        new = {*tmp_path.iterdir()} - before
        assert not new or done.returncode == 0, (arguments, new, done.stderr)
        for path in new:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    check()
