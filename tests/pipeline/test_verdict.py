"""Words of a verdict: no evidence is claimed on the data that chose, and test data are compared with an interval."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Job, Run

import ckptavg
from ckptavg.coefficients import Coefficients
from ckptavg.cost import Cost
from ckptavg.pipeline.verdict import Verdict, by_loss, loss_on_test, with_test
from ckptavg.pipeline.winner import higher_on_test
from ckptavg.report.result import Gain, StrategyResult
from ckptavg.score import PerExample, Score, Split

RANDOM = """
import torch
from torch import nn

def model(): return nn.Linear(5, 2)
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
def metric(model, batch): return (model(batch[0]).argmax(dim=1) == batch[1]).float()
def val_dataloader():
    draws = torch.Generator().manual_seed(SEED)
    return [(torch.randn(400, 5, generator=draws), torch.randint(2, (400,), generator=draws))]
"""
ON_ITS_DATA, HOLDOUT = "on the data it was chosen on", "--holdout 0.5 keeps half of the validation examples"


@pytest.fixture
def linears(tmp_path: Path) -> Path:
    """Eight linear classifiers that have learned nothing."""
    folder = tmp_path / "linears"
    folder.mkdir()
    for step in range(8):
        torch.manual_seed(step)
        torch.save(torch.nn.Linear(5, 2).state_dict(), folder / f"step-{step}.pt")
    return folder


def test_no_interval_is_reported_on_random_labels_that_chose(linears: Path, tmp_path: Path):
    """The label is a coin's, so no strategy is better than another; ten data sets, of which some please a strategy."""
    won = 0
    for seed in range(10):
        (tmp_path / "task.py").write_text(RANDOM.replace("SEED", str(seed)))
        done = ckptavg.compare(
            linears,
            strategies=["best", "swa", "soup"],
            task=str(tmp_path / "task.py"),
            output=tmp_path / "x",
            force=True,
            select_by="metric",
        )
        for one in done.strategies:
            assert (one.over_last["val"].low, one.over_last["val"].high, one.over_last["val"].separated) == (
                None,
                None,
                False,
            )
        assert "[" not in done.verdict
        won += (wins := f"{done.winner} wins on validation data with metric 0." in done.verdict)
        assert not wins or (ON_ITS_DATA in done.verdict and HOLDOUT in done.verdict)
    assert won > 5


def test_a_report_on_the_data_of_the_choice_shows_neither_interval_nor_mark(jobs: dict[str, Job], run: Run):
    job = jobs["transformer"]
    done = run("compare", job.folder, "--task", job.task, "--strategies", "swa,soup")
    text = " ".join(done.stderr.split())
    assert "wins on validation data" in text and ON_ITS_DATA in text and "strategies chose" in text
    assert "[" not in text and "≈" not in text and "interval" not in text


@pytest.mark.parametrize(("command", "learned"), [("soup", True), ("swa", False)])
def test_a_single_command_says_on_which_data_it_was_chosen(linears: Path, tmp_path: Path, command: str, learned: bool):
    (tmp_path / "task.py").write_text(RANDOM.replace("SEED", "0"))
    done = getattr(ckptavg, command)(linears, task=str(tmp_path / "task.py"), output=tmp_path / "x")
    assert done.scores["val"].metric is not None and "[" not in done.verdict and not done.gains
    assert (ON_ITS_DATA in done.verdict) == learned == (HOLDOUT in done.verdict)
    assert learned or "on validation data" in done.verdict


def test_a_command_has_no_holdout_and_is_told_of_other_data(linears: Path, run: Run):
    done = run("soup", linears, "--score-cmd", "true {} && echo 1")
    text = " ".join(done.stderr.split())
    assert f"No better than a single candidate {ON_ITS_DATA}" in text
    assert "score the file once on data that the search has not seen" in text and "--holdout" not in text
    for words in (("--score-cmd", "echo 1 {}"), ("--lm-eval", "arc_easy")):
        refused = run("soup", linears, *words, "--holdout", "0.5")
        assert refused.returncode == 2 and f"{words[0]} has its own" in " ".join(refused.stderr.split())


def answers(right: int, of: int = 400) -> Score:
    values = (torch.arange(of) < right).double()
    each = PerExample(values_U=values, examples_U=torch.ones(of, dtype=torch.float64))
    return Score(value=right / of, loss=None, metric=right / of, examples=of, per_example=each)


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (340, "Better than the best single candidate (step 7) on test data: +0.100 [+0.070, +0.133]"),
        (260, "WORSE than the best single candidate (step 7) on test data: -0.100 [-0.133, -0.070]"),
        (304, "Difference to the best single candidate (step 7) on test data: +0.0100 (no interval: 4 of 400 "),
    ],
)  # fmt: skip
def test_on_test_data_the_verdict_has_the_interval_of_the_difference(right: int, words: str):
    known: dict[str, dict[Split, Score]] = {
        "best": {"val": answers(1), "test": answers(300)}, "last": {"val": answers(1), "test": answers(200)},
        "swa": {"val": answers(3), "test": answers(100)}, "lawa-2": {"val": answers(2), "test": answers(400)},
    }  # fmt: skip
    verdict = Verdict(Coefficients.uniform([0], 1), baselines=known, best_step=7, verdict="On val.")
    written: dict[Split, Score] = {"val": answers(1), "test": answers(right)}
    found = with_test(verdict, written, "val")
    assert found.verdict.startswith(words)
    last, swa = found.gains["last"], found.gains["swa"]
    # swa is the better plain average on validation data; that lawa is better on test data decides nothing
    assert found.verdict.endswith(f" Difference to last {last}, to swa {swa}.") and set(found.gains) == set(known)
    assert with_test(replace(verdict, worse=True), written, "val").verdict.startswith(f"On val. {words}")
    assert with_test(verdict, {"val": answers(1)}, "val").verdict == "On val."
    assert "to swa" not in with_test(replace(verdict, same=["swa"]), written, "val").verdict


def test_differences_of_either_sign_are_not_distinguishable_from_none():
    turned = answers(200)
    assert turned.per_example is not None
    turned = replace(turned, per_example=replace(turned.per_example, values_U=turned.per_example.values_U.flip(0)))
    verdict = Verdict(Coefficients.uniform([0], 1), baselines={"best": {"val": answers(1), "test": answers(200)}})
    found = with_test(verdict, {"val": answers(1), "test": turned}, "val")
    assert found.verdict.startswith("Not distinguishable from the best single candidate") and "[-0.0" in found.verdict


@pytest.mark.parametrize(
    ("command", "settings", "compared"),
    [
        ("best", {}, "the last candidate; to swa"),  # lawa-1 is last
        ("last", {}, "the best single candidate; to swa"),
        ("lawa", {"k": 3}, "the best single candidate; to last; to swa"),
        ("sewa", {"k": 8, "steps": 1, "verify": 1}, "the best single candidate; to last"),  # all of them are swa
    ],
)
def test_no_average_is_compared_with_itself(
    linears: Path, tmp_path: Path, command: str, settings: dict[str, int], compared: str
):
    source = RANDOM.replace("SEED", "0") + "test_dataloader = val_dataloader\n"
    (tmp_path / "task.py").write_text(source)
    done = getattr(ckptavg, command)(linears, task=str(tmp_path / "task.py"), output=tmp_path / "x", **settings)
    rivals = re.findall(r"(the (?:last|best single) candidate|to (?:last|swa|lawa)\b)", done.verdict)
    assert "; ".join(dict.fromkeys(rivals)) == compared and " on test data" in done.verdict
    assert set(done.gains) == set(done.baselines)


def by_two(accuracy: float, loss: float) -> Score:
    return Score(value=accuracy, loss=loss, metric=accuracy, examples=9, name="accuracy")


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ((0.8, 0.2), "But its validation loss, 0.2000, is lower than that of every single candidate."),
        ((0.95, 0.4), "But its validation loss, 0.4000, is higher than that of step 20 alone, 0.3000."),
        ((0.95, 0.2), ""),
        ((0.8, 0.4), ""),
    ],
)
def test_the_verdict_says_where_the_loss_orders_otherwise_than_the_metric(chosen: tuple[float, float], words: str):
    singles = [by_two(0.9, 0.5), by_two(0.7, 0.3)]
    assert by_loss(by_two(*chosen), singles, singles[0], [10, 20], "val").strip() == words


@pytest.mark.parametrize(("gain", "loss", "order"), [(0.05, 0.4, "higher"), (-0.1, 0.2, "lower"), (0.0, 0.2, "lower")])
def test_the_verdict_on_test_data_says_so_too(gain: float, loss: float, order: str):
    text = f" But its test loss is {order}: {loss:.4f}, against 0.3000."
    assert loss_on_test(by_two(0.9, loss), by_two(0.9 - gain, 0.3), Gain(value=gain)) == text
    assert loss_on_test(by_two(0.9, 0.6 - loss), by_two(0.9, 0.3), Gain(value=gain or -1.0)) == ""


def test_lawa_of_one_candidate_is_left_out_where_last_is_shown(linears: Path, tmp_path: Path):
    (tmp_path / "task.py").write_text(RANDOM.replace("SEED", "0"))
    done = ckptavg.best(linears, task=str(tmp_path / "task.py"), output=tmp_path / "x")
    assert set(done.baselines) == {"best", "last", "swa"}


def test_compare_says_which_strategy_scores_higher_on_test_data():
    def result(name: str, test: Score) -> StrategyResult:
        cost = Cost(forward_batches=0, backward_batches=0, evaluations=0, seconds=0.0, epochs=None, epochs_of="val")
        return StrategyResult(
            name=name, strategy=name, settings={}, coefficients=(), groups=(("",),), used=2, effective=2.0,
            over_last={}, cost=cost,
            scores={"val": answers(1), "test": test},
        )  # fmt: skip

    winner, better = result("swa", answers(202)), result("ema", answers(400))
    turned = answers(204)
    assert turned.per_example is not None
    values_U = turned.per_example.values_U.flip(0)
    same = result("lawa", replace(turned, per_example=replace(turned.per_example, values_U=values_U)))
    text = higher_on_test([winner, same], winner)
    assert text.startswith(" lawa scores higher on test data, within noise: +0.005 [-")
    text = higher_on_test([winner, same, better], winner)
    assert text.startswith(" ema scores higher on test data, but the best of 3 may be so by chance: +0.49")
    assert text.endswith("]; 1 other too.") and higher_on_test([winner, same, better], better) == ""
    for held_out, known in ((None, "no held-out loss"), (0.3, "a held-out loss of 0.3000")):
        passed_over = replace(better, scores={"val": answers(3), "test": answers(400)}, held_out=held_out)
        text = higher_on_test([winner, same, passed_over], winner)
        assert text.startswith(f" ema scores higher on test data, as on validation data, but it has {known}: +0.49")
