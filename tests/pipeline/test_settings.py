"""Settings of a solver that does not run: each is refused, by the command line, by `compare` and by Python."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import Run

import ckptavg
from ckptavg.declaration import Option, declared
from ckptavg.errors import UsageError
from ckptavg.pipeline.preflight import check_strategy
from ckptavg.strategies import from_spec

SOLVERS = {
    "twa": {
        "gradient solver": {"solver": "gradient"}, "quadratic solver": {"solver": "quadratic"},
        "linear constraint": {"constraint": "linear"},
    },
    "sewa": {"gumbel solver": {"solver": "gumbel"}, "quadratic solver": {"solver": "quadratic"}},
}  # fmt: skip


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for step in (1, 2, 3):
        torch.save({"weight": torch.full((1, 1), float(step))}, folder / f"step-{step}.pt")
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def model(): return torch.nn.Linear(1, 1, bias=False)\n"
        "def loss(model, batch): raise AssertionError('no work before the refusal')\n"
        "def val_dataloader(): return [torch.ones(4, 1)]\n"
    )
    return folder


BY_SCORES = ("--score-cmd", f"{sys.executable} -c 'print(1)' {{}}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "twa --ridge 0.1",
            "--ridge is a setting of the quadratic solver or the fit of --constraint linear; the gradient solver does",
        ),
        ("twa --constraint linear --lr 3", "--lr is a setting of the gradient solver; the fit of --constraint linear"),
        ("twa --constraint linear --layerwise", "hint: leave out --layerwise"),
        ("twa --constraint linear --force-linear --ridge 1", "the gradient solver does not use it"),
        ("twa --constraint linear --solver quadratic", "--constraint linear is not for the quadratic solver"),
        ("twa --force-linear", "--force-linear goes with --constraint linear"),
        ("twa --solver quadratic --lr 3", "--lr is a setting of the gradient solver"),
        ("twa --solver quadratic --clip 2", "--clip is a setting of the gradient solver"),
        ("twa --evaluations 7", "--evaluations is a setting of the search by --score-cmd or --lm-eval"),
        ("sewa --k 2 --solver quadratic --steps 9", "--steps is a setting of the gumbel solver"),
        ("sewa --k 2 --hessian exact", "--hessian is a setting of the quadratic solver"),
        ("twa --patience 2 --select-by loss", "--select-by loss chooses among scored points, and --patience takes"),
        ("sewa --k 2 --verify 1 --select-by metric", "--select-by metric chooses among scored masks, and --verify 1"),
        ("sewa --k 2 --verify 1 --swaps 9", "--swaps 9 scores masks, and --verify 1 scores none"),
        ("compare --strategies swa,twa:ridge=0.1", "twa:ridge=0.1: --ridge is a setting of the quadratic solver"),
    ],
)  # fmt: skip
def test_a_setting_that_the_solver_does_not_use_is_refused_before_any_work(
    ckpts: Path, run: Run, words: str, message: str
):
    name, *more = words.split()
    done = run(name, ckpts, *more, "--task", "mine.py")
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_search_by_scores_refuses_settings_of_solvers_that_need_a_loss(ckpts: Path, run: Run):
    for setting in ("--select-by", "loss"), ("--verify", 2), ("--swaps", 3):
        done = run("sewa", ckpts, "--k", 2, *BY_SCORES, *setting)
        assert done.returncode == 2 and f"{setting[0]} is a setting of the gumbel" in done.stderr, done.stderr
        assert f"hint: leave out {setting[0]}" in done.stderr


def test_a_fit_of_outputs_is_refused_without_a_loss(ckpts: Path, run: Run):
    for more in ((), ("--force-linear",)):
        done = run("twa", ckpts, "--constraint", "linear", *more, *BY_SCORES)
        assert done.returncode == 2 and "needs a loss and the model's outputs, not scores alone" in done.stderr


def test_python_refuses_the_settings_that_the_command_line_refuses(ckpts: Path):
    with pytest.raises(UsageError, match="--ridge is a setting of the quadratic solver"):
        ckptavg.twa(ckpts, ridge=0.1, task=str(ckpts.parent / "mine.py"), output=ckpts.parent / "out")


def other(option: Option) -> Any:
    """Return a valid value that is not the default."""
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    return not option.default if option.kind is bool else 7


def test_each_setting_is_refused_for_exactly_the_solvers_that_do_not_use_it():
    class Evaluator:
        bounded = False

        def __init__(self, losses: object) -> None:
            self.losses = losses

        def has(self, _split: str) -> bool:
            return True

    for name, solvers in SOLVERS.items():
        strategy = from_spec(name)
        for option in declared(type(strategy)):
            users = option.help.solvers
            for solver, choice in (solvers | {"": {}}).items():  # "": by scores
                named = {solver, "both solvers"} if solver else {"search by scores"}
                evaluator: Any = Evaluator(object() if solver else None)
                if option.name == "force_linear" or (
                    option.name in ("solver", "constraint") and "constraint" in choice
                ):
                    continue
                given: Any = replace(cast("Any", strategy), **{option.name: other(option), **choice})
                if option.name in ("solver", "k") or not users or named & {*users}:
                    given = given if option.name != "solver" else strategy
                    check_strategy(given, 9, evaluator)
                else:
                    with pytest.raises(UsageError, match=f"^{option.flag} is a setting of"):
                        check_strategy(given, 9, evaluator)
