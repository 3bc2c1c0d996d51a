"""``ckptavg compare`` on the demo's checkpoints: every row equals a separate run, and the winner is written."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK, Job, Run
from rich.console import Console
from safetensors.torch import load_file

import ckptavg
from ckptavg.pipeline.comparison import DEFAULT
from ckptavg.report import table
from ckptavg.report.result import Comparison
from ckptavg.runtime.progress import RESULT
from ckptavg.strategies import from_spec, strategies


@pytest.fixture(scope="session")
def compared(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """All strategies on all 24 checkpoints."""
    output = tmp_path_factory.mktemp("compared") / "averaged.safetensors"
    return ckptavg.compare(digits, task=TASK, output=output)


@pytest.mark.thorough
def test_runs_every_strategy_by_default(compared: Comparison):
    assert [one.name for one in compared.strategies] == [*DEFAULT]
    assert {spec.partition(":")[0] for spec in DEFAULT} <= set(strategies())  # a new one takes part where it is named


def test_writes_the_strategy_with_the_lowest_held_out_loss_where_the_accuracy_agrees(compared: Comparison):
    best = max(one.scores["val"].value for one in compared.strategies)
    held_out = min(one.held_out for one in compared.strategies if one.held_out is not None)
    winner = next(one for one in compared.strategies if one.name == compared.winner)
    lowest = winner.scores["val"].loss
    assert winner.held_out == held_out and compared.selected_by == "held-out loss"
    assert "the loss ranks them like accuracy (Spearman 0." in compared.reason
    passed_over = f"Passed over on validation data: {{}} with accuracy {best:.3f}"
    above = [one.name for one in compared.strategies if one.scores["val"].value == best > winner.scores["val"].value]
    assert not above or any(passed_over.format(name) in compared.verdict for name in above)
    assert compared.output is not None and compared.strategy == winner.strategy
    assert [one.coefficient for one in compared.candidates] == list(winner.coefficients)
    # the written file was scored again
    assert compared.scores["val"].loss == pytest.approx(lowest, abs=1e-6)
    assert compared.scores["test"].value == pytest.approx(winner.scores["test"].value, abs=1e-6)
    assert load_file(compared.output.path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["last", "soup", "aswa", "sewa", "twa:on=train"])
def test_each_row_equals_a_separate_run_of_the_strategy(compared: Comparison, digits: Path, tmp_path: Path, name: str):
    """The same coefficients, scores and batches as its own command without baselines."""
    row = next(one for one in compared.strategies if one.name == name)
    settings: dict[str, Any] = {"on": "train"} if ":" in name else {}
    alone = getattr(ckptavg, row.strategy)(digits, task=TASK, output=tmp_path / "x", baselines=False, **settings)
    assert [one.coefficient for one in alone.candidates] == list(row.coefficients)
    assert alone.scores["val"].value == pytest.approx(row.scores["val"].value, abs=1e-6)
    assert alone.settings == row.settings and alone.cost is not None
    assert alone.cost.backward_batches == row.cost.backward_batches
    # alone, the file is scored too, on validation and test data: 8 + 8 forward passes, BatchNorm from 15; where the
    # search has not scored the selection, its model does instead of the comparison's: 15 + 8
    assert alone.cost.forward_batches == row.cost.forward_batches + (16 if name == "last" else 31)


def test_gains_over_last_use_the_same_examples(compared: Comparison):
    last = next(one for one in compared.strategies if one.name == "last")
    for one in compared.strategies:
        for split, found in one.over_last.items():
            assert found.value == pytest.approx(one.scores[split].value - last.scores[split].value)
            if split == "val" or one.name == "last":  # strategies chose on it; it does not differ from itself
                assert (found.low, found.high, found.separated) == (None, None, False)
            else:
                assert found.low is not None and found.high is not None
                assert found.low < found.value < found.high and found.units == 400
    assert not last.over_last["test"].separated
    swa = next(one for one in compared.strategies if one.name == "swa")
    assert swa.over_last["test"].separated  # twelve points on four hundred examples


def test_table_and_json_report_every_strategy(digits: Path, run: Run):
    names = "swa,lawa:k=3,twa:epochs=1,sewa:k=2:steps=1:on=train,sewa:k=2:steps=1:on=train:verify=1"
    done = run("compare", digits, "--last", 5, "--task", TASK, "--strategies", names, "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert [one["name"] for one in report["strategies"]] == ["last", *names.split(",")]
    # what is learned on training data has chosen on validation data if points of it were scored there
    assert [one["chose_on"] for one in report["strategies"]] == [None, None, None, "val", "val", "train"]
    assert report["winner"] in names and report["output"]["data_digest"] and report["holdout"] is None
    over = report["strategies"][1]["over_last"]["test"]
    assert over["low"] <= over["value"] <= over["high"] and over["units"] == 400
    flat = " ".join(done.stderr.split())
    for expected in (
        "● ",
        "vs last (test)",
        "95 % interval over 400 examples",
        "wins on validation data with loss 0.",
    ):
        assert expected in flat, expected
    for one in report["strategies"][1:]:
        marked = re.search(rf"{re.escape(one['name'])} .*\](?P<mark> +≈)?", done.stderr)
        assert marked is not None and (marked["mark"] is None) == one["over_last"]["test"]["separated"]
    assert "Better than the last candidate on test data by accuracy: +" in flat  # twelve points


def test_narrow_terminal_shows_every_score(compared: Comparison):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table.render(compared))
    text = console.export_text()
    for one in compared.strategies:
        for score in one.scores.values():
            assert f"{score.metric:.3f}" in text, text


def test_test_data_do_not_change_the_decision(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With wrong test labels, the coefficients and the winner are the same."""
    spoilt = (
        TASK.read_text()
        + "\n\n_real = test_dataloader\n\n\ndef test_dataloader():\n"
        + "    return [(x, (y + 1) % 10) for x, y in _real()]\n"
    )
    (tmp_path / "spoilt.py").write_text(spoilt)
    monkeypatch.chdir(tmp_path)
    runs = [
        ckptavg.compare(
            digits, strategies=["soup", "aswa", "sewa:steps=20", "twa:patience=2"], task=str(task), last=6,
            output=tmp_path / f"{i}", force=True,
        )
        for i, task in enumerate((TASK, tmp_path / "spoilt.py"))
    ]  # fmt: skip
    first, second = ([(one.name, one.coefficients) for one in each.strategies] for each in runs)
    assert first == second and runs[0].winner == runs[1].winner
    assert runs[0].strategies[0].scores["test"] != runs[1].strategies[0].scores["test"]


def test_holdout_splits_the_validation_data_of_a_task_without_test_data(jobs: dict[str, Job], run: Run, tmp_path: Path):
    job = jobs["transformer"]
    base = ("compare", job.folder, "--task", job.task, "--strategies", "swa,aswa", "--json", "--force")
    whole, half = (json.loads(run(*base, *more).stdout) for more in ((), ("--holdout", 0.5)))
    assert whole["holdout"] is None and "test" not in whole["strategies"][0]["scores"]
    scores = half["strategies"][0]["scores"]
    assert half["holdout"] == 0.5 and scores["val"]["examples"] + scores["test"]["examples"] == 100
    text = " ".join(run(*base, "--holdout", 0.5).stderr.split())
    assert "test is 50% of the validation data" in text and "seeded hash" in text


def test_refuses_a_holdout_for_a_task_with_test_data(digits: Path, run: Run):
    done = run("compare", digits, "--task", TASK, "--holdout", 0.5)
    assert done.returncode == 2 and "the task has test data" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strategies", "swa,nonsense"), "no strategy 'nonsense'"),
        (("--strategies", "swa,lawa:k=99"), "lawa:k=99: --k 99 asks for more checkpoints than the 24"),
        (("--strategies", "swa,twa:ridge=-1"), "twa:ridge=-1: --ridge must be at least 0, not -1"),
        (
            ("--strategies", "swa,twa:solver=quadratic:layerwise"),
            "twa:solver=quadratic:layerwise: --layerwise is a setting of the gradient solver; the quadratic solver "
            "does not use it hint: twa:solver=gradient, or leave out --layerwise",
        ),
        (("--holdout", "1.5"), "--holdout must be between 0 and 1"),
        (("--bits", "3"), "--bits"),
        (("--group-size", "0"), "--group-size must be at least 1"),
    ],
)
def test_invalid_options_are_refused_before_anything_runs(
    digits: Path, run: Run, options: tuple[str, str], message: str
):
    done = run("compare", digits, "--task", TASK, *options)
    assert done.returncode == 2 and message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


ONCE = """
class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient

_loss = loss
def loss(model, batch):
    still = 0 * sum(weight.sum() for weight in model.parameters())
    return _loss(lambda x: _Once.apply(model(_Once.apply(x + still))), batch)
"""


@pytest.fixture
def once(tmp_path: Path) -> Path:
    """A task whose loss has no second derivatives, which the quadratic solver needs."""
    (tmp_path / "once.py").write_text(f"import torch\n{TASK.read_text()}\n{ONCE}")
    return tmp_path / "once.py"


def test_a_default_strategy_in_which_the_task_fails_is_left_out_and_named_with_the_reason(
    digits: Path, run: Run, once: Path
):
    done = run("compare", digits, "--task", once, "--last", 3, "--json")
    assert done.returncode == 0, done.stderr
    report, failing = json.loads(done.stdout), "twa:solver=quadratic"
    assert report["unfinished"] == [failing] and report["winner"] != failing and report["output"]["data_digest"]
    (reason,) = [text for text in report["warnings"] if text.startswith(f"{failing} failed and was left out: ")]
    assert f"{once}: no " in reason and "once_differentiable" in reason and "\n" not in reason
    listed = ",".join(row["name"] for row in report["strategies"])
    without = json.loads(
        run("compare", digits, "--task", once, "--last", 3, "--strategies", listed, "--json", "--force").stdout
    )
    for row in (*report["strategies"], *without["strategies"]):
        del row["cost"]
    assert report["strategies"] == without["strategies"] and len(report["strategies"]) == len(DEFAULT) - 1


def test_an_error_in_a_listed_strategy_ends_the_run_and_names_it(digits: Path, run: Run, once: Path):
    done = run("compare", digits, "--task", once, "--last", 3, "--strategies", "swa,twa:solver=quadratic")
    assert done.returncode == 7 and f"error: twa:solver=quadratic: {once}: no " in done.stderr
    assert "hint: choose --strategies without twa:solver=quadratic" in done.stderr
    assert not (once.parent / "averaged.safetensors").exists()


def test_an_error_in_every_default_strategy_or_in_last_ends_the_run(digits: Path, run: Run, tmp_path: Path):
    (tmp_path / "nan.py").write_text(f"{TASK.read_text()}\n_loss = loss\ndef loss(m, b):\n    raise ValueError('no')\n")
    done = run("compare", digits, "--task", "nan.py", "--last", 3)
    assert done.returncode == 7 and "error: last: nan.py:" in done.stderr and "ValueError: no" in done.stderr


def test_a_hint_at_a_setting_is_written_as_in_the_list(digits: Path, run: Run):
    done = run("compare", digits, "--task", TASK, "--last", 2, "--strategies", "sewa")
    assert done.returncode == 2 and "error: sewa: --k 5 asks for more checkpoints than the 2" in done.stderr
    assert "hint: choose sewa:k=2 or less, or widen the window (--window, --last," in done.stderr


def test_refuses_to_compare_without_a_task(digits: Path, run: Run):
    done = run("compare", digits)
    assert done.returncode == 2 and "ckptavg init" in done.stderr


def test_default_k_is_limited_by_the_number_of_candidates(digits: Path, tmp_path: Path):
    done = ckptavg.compare(digits, task=TASK, last=3, output=tmp_path / "x", strategies=())
    assert {"lawa:k=3", "sewa:k=3"} <= {one.name for one in done.strategies}
    assert from_spec("lawa:k=3")


def test_dry_run_names_the_strategies(digits: Path, run: Run, tmp_path: Path):
    done = run("compare", digits, "--task", TASK, "--dry-run")
    assert (done.returncode, done.stdout) == (0, "") and not list(tmp_path.iterdir())
    assert (
        "would compare last, best, swa, lawa, ema, wsm, soup, aswa, sewa, twa, twa:on=train, twa:solver=quadratic"
        in done.stderr
    )


def test_cheap_strategies_run_first_and_each_row_is_shown_as_it_comes(digits: Path, tmp_path: Path):
    """The order of the report is that of the list: only the order of the runs changes."""
    finished: list[tuple[str, dict[str, float]]] = []

    def watch(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        if stage.endswith(RESULT):
            finished.append((stage.removesuffix(RESULT), dict(metrics)))

    names = ["sewa:k=2:steps=30", "soup", "swa", "twa:epochs=1", "best"]
    done = ckptavg.compare(digits, names, task=TASK, output=tmp_path / "x", last=4, watch=watch)
    # 4 scores; 6, and 8 batches forward and backward; 7; 60 batches forward and backward, and more scores
    assert [name for name, _ in finished] == ["last", "swa", "best", "twa:epochs=1", "soup", "sewa:k=2:steps=30"]
    assert [row.name for row in done.strategies] == ["last", *names]
    for row in done.strategies:
        figures = dict(finished)[row.name]
        expected = {"val accuracy": row.scores["val"].metric, "val loss": row.scores["val"].loss, "s": row.cost.seconds}
        assert figures == {**expected, "passes": row.cost.passes}


def test_the_requested_figure_chooses_the_winner(digits: Path, tmp_path: Path):
    for by, best in (("loss", min), ("metric", max)):
        done = ckptavg.compare(digits, "swa,best,lawa:k=2", task=TASK, last=4, output=tmp_path / by, select_by=by)
        values = {row.name: getattr(row.scores["val"], by) for row in done.strategies}
        assert done.selected_by == by and values[done.winner] == best(values.values())
        assert done.reason.startswith(f"chosen by {'accuracy' if by == 'metric' else by} (--select-by)")


def test_progress_names_the_running_strategy(digits: Path, tmp_path: Path):
    stages: list[str] = []
    from ckptavg.options import Options
    from ckptavg.pipeline.comparison import compare

    with torch.random.fork_rng():
        compare(
            [digits], Options(task=str(TASK), output=tmp_path / "x", last=3),
            lambda stage, *_: stages.append(stage), strategies=["swa", "soup"],
        )  # fmt: skip
    assert any("soup: growing the soup" in stage for stage in stages)
