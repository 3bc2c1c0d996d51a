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
from ckptavg.pipeline.verdict import Verdict, with_test
from ckptavg.score import PerExample, Score

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
        )
        for one in done.strategies:
            assert (one.over_last["val"].low, one.over_last["val"].high, one.over_last["val"].separated) == (
                None,
                None,
                False,
            )
        assert "[" not in done.verdict
        won += (wins := f"{done.winner} wins on val data: +" in done.verdict)
        assert not wins or (ON_ITS_DATA in done.verdict and HOLDOUT in done.verdict)
    assert won > 5


def test_a_report_on_the_data_of_the_choice_shows_neither_interval_nor_mark(jobs: dict[str, Job], run: Run):
    job = jobs["transformer"]
    done = run("compare", job.folder, "--task", job.task, "--strategies", "swa,soup")
    text = " ".join(done.stderr.split())
    assert "wins on val data" in text and ON_ITS_DATA in text and "strategies chose" in text
    assert "[" not in text and "≈" not in text and "interval" not in text


@pytest.mark.parametrize(("command", "learned"), [("soup", True), ("swa", False)])
def test_a_single_command_says_on_which_data_it_was_chosen(linears: Path, tmp_path: Path, command: str, learned: bool):
    (tmp_path / "task.py").write_text(RANDOM.replace("SEED", "0"))
    done = getattr(ckptavg, command)(linears, task=str(tmp_path / "task.py"), output=tmp_path / "x")
    assert done.scores["val"].metric is not None and "[" not in done.verdict and not done.gains
    assert (ON_ITS_DATA in done.verdict) == learned == (HOLDOUT in done.verdict)
    assert learned or "on val data" in done.verdict


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
        (340, "Better than the best single candidate (step 7) on test data: +0.1000 [+0.07"),
        (260, "WORSE than the best single candidate (step 7) on test data: -0.1000 [-0.1"),
        (304, "Difference to the best single candidate (step 7) on test data: +0.0100 (no interval: 4 of 400 "),
    ],
)  # fmt: skip
def test_on_test_data_the_verdict_has_the_interval_of_the_difference(right: int, words: str):
    known = {"best": {"val": answers(1), "test": answers(300)}, "last": {"val": answers(1), "test": answers(200)}}
    known |= {"swa": {"val": answers(3), "test": answers(100)}, "lawa-2": {"val": answers(2), "test": answers(400)}}
    verdict = Verdict(Coefficients.uniform([0], 1), baselines=known, best_step=7, verdict="On val.")
    written = {"val": answers(1), "test": answers(right)}
    found = with_test(verdict, written, "val")
    assert found.verdict.startswith(words)
    last, swa = found.gains["last"], found.gains["swa"]
    # swa is the better plain average on validation data; that lawa is better on test data decides nothing
    assert found.verdict.endswith(f" Over last {last}; over swa {swa}.") and set(found.gains) == set(known)
    assert with_test(replace(verdict, worse=True), written, "val").verdict.startswith(f"On val. {words}")
    assert with_test(verdict, {"val": answers(1)}, "val").verdict == "On val."
    assert "over swa" not in with_test(replace(verdict, same=["swa"]), written, "val").verdict


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
        ("best", {}, "the last candidate; over swa"),  # lawa-1 is last
        ("last", {}, "the best single candidate; over swa"),
        ("lawa", {"k": 3}, "the best single candidate; over last; over swa"),
        ("sewa", {"k": 8, "steps": 1, "verify": 1}, "the best single candidate; over last"),  # all of them are swa
    ],
)
def test_no_average_is_compared_with_itself(
    linears: Path, tmp_path: Path, command: str, settings: dict[str, int], compared: str
):
    source = RANDOM.replace("SEED", "0") + "test_dataloader = val_dataloader\n"
    (tmp_path / "task.py").write_text(source)
    done = getattr(ckptavg, command)(linears, task=str(tmp_path / "task.py"), output=tmp_path / "x", **settings)
    rivals = re.findall(r"(the (?:last|best single) candidate|over [\w-]+)", done.verdict.lower())
    assert "; ".join(dict.fromkeys(rivals)) == compared and " on test data" in done.verdict
    assert set(done.gains) == set(done.baselines)
