"""Metrics of class probabilities against scikit-learn and torchmetrics, and several metrics through a whole run."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import TASK, Run
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

import ckptavg
from ckptavg.errors import TaskError
from ckptavg.objective.score_accumulator import ScoreAccumulator
from ckptavg.report.interval import single_gain
from ckptavg.score import Score
from ckptavg.tasks.probabilities import ProbabilityMetrics, calibration_gaps, checked, labels_of, probability_metrics

DRAWS = torch.Generator().manual_seed(0)
P = (2 * torch.randn(500, 4, generator=DRAWS)).softmax(dim=1)
LABELS = torch.randint(4, (500,), generator=DRAWS)
PREDICT = """

def predict(model, batch):
    return model(batch[0]).softmax(dim=1)
"""
NAMED = """

def metric(model, batch):
    logits = model(batch[0])
    return {"top2": (logits.topk(2).indices == batch[1][:, None]).any(1), "margin": logits.amax(1)}
"""


def naive_ece(p: np.ndarray, labels: np.ndarray) -> float:
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    inside = [(confidence > m / 15) & (confidence <= (m + 1) / 15) for m in range(15)]
    return sum(abs(confidence[i].mean() - right[i].mean()) * i.mean() for i in inside if i.any())


def task(folder: Path, more: str, *, own: bool = False) -> Path:
    source = TASK.read_text()
    (folder / "several.py").write_text((source if own else source.replace("metric = accuracy", "")) + more)
    return folder / "several.py"


def test_metrics_of_probabilities_match_scikit_learn():
    values = probability_metrics(P, LABELS)
    exact = P.double() / P.double().sum(dim=1, keepdim=True)  # moves a probability by float32 rounding
    # float64, rounded once to float32: 2**-24 of each value
    for name, expected in (
        ("accuracy", accuracy_score(LABELS, P.argmax(1))),
        ("nll", log_loss(LABELS, exact)),
        ("brier", sum(brier_score_loss(c == LABELS, exact[:, c]) for c in range(4))),
    ):
        assert float(values[name].double().mean()) == pytest.approx(expected, rel=1e-6), name


def test_the_calibration_error_is_the_mean_of_its_terms():
    from torchmetrics.functional.classification import multiclass_calibration_error

    terms_U = calibration_gaps(probability_metrics(P, LABELS)["ece"].double())
    assert float(terms_U.mean()) == pytest.approx(naive_ece(P.double().numpy(), LABELS.numpy()), rel=1e-6)
    assert float(terms_U.mean()) == pytest.approx(float(multiclass_calibration_error(P, LABELS, 4, n_bins=15)), 1e-5)


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        (P.log(), LABELS, "must return probabilities, but its result has -"),
        (P * 2, LABELS, "rows with the sum 2"),
        (P[:, 0], LABELS, r"\[B, C\], not a tensor of shape \[500\]"),
        (P, LABELS[:9], r"labels must be integers \[500\]"),
        (P, LABELS + 1, "outside the 4 classes"),
        (P, LABELS.float(), "labels must be integers"),
    ],
)
def test_results_that_are_no_probabilities_are_refused_in_one_line(p: Any, labels: Any, message: str):
    with pytest.raises(TaskError, match=message) as error:
        checked(p, labels, "task.py", ", for batch 1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("values", "hint"), [(P.log(), ".exp()"), (P.logit(), "softmax"), (-P, "softmax")])
def test_log_probabilities_have_a_hint_of_their_own(values: torch.Tensor, hint: str):
    with pytest.raises(TaskError) as error:
        checked(values, LABELS, "task.py", "")
    assert error.value.hint is not None and hint in error.value.hint and ("exp" in hint) == ("log-" in error.value.hint)


def test_examples_checked_without_waiting_become_nan():
    p, labels = P.clone(), LABELS.clone()
    p[0], p[1, 2], labels[2], labels[3] = p[0] * 2, -1.0, 4, -100
    values = probability_metrics(*checked(p, labels, "task.py", "", wait=False))
    expected = probability_metrics(P, LABELS)
    for name, value_B in values.items():
        assert value_B[:4].isnan().all() and torch.equal(value_B[4:], expected[name][4:]), name


HELPERS = {
    "raises": ("    return model(batch).argmax(1)", "TypeError"),
    "one column": ("    return model(batch[0])[:, :1]", "a tensor of shape [100, 1]"),
    "labels": ("    return model(batch[0]).argmax(1)", "a tensor of shape [100]"),
    "integers": ("    return model(batch[0]).long()", "a torch.int64 tensor"),
    "a dict": ("    return {'logits': model(batch[0])}", "a dict"),
}


@pytest.mark.parametrize("helper", HELPERS)
def test_a_predict_for_something_else_is_left_out_with_one_remark(digits: Path, tmp_path: Path, helper: str):
    body, reason = HELPERS[helper]
    more = f"\n\ndef predict(model, batch):\n{body}\n"
    file = task(tmp_path, more, own=True)
    with_helper = ckptavg.aswa(digits, task=file, last=4, output=tmp_path / "x")
    plain = ckptavg.aswa(digits, task=TASK, last=4, output=tmp_path / "y")
    assert with_helper.scores == plain.scores and not with_helper.scores["val"].others
    remarks = [warning for warning in with_helper.warnings if "accuracy, nll, brier and ece are left out" in warning]
    assert len(remarks) == 1 and "rename it" in remarks[0] and reason in remarks[0]
    file.write_text(file.read_text() + "metric_key = 'nll'\ndel metric\n")
    with pytest.raises(TaskError, match="predict"):
        ckptavg.best(digits, task=file, last=2, output=tmp_path / "z")


def test_a_predict_that_fails_later_is_an_error():
    def predict(_: Any, batch: Any) -> torch.Tensor:
        return P[:, 0] if batch == 2 else P

    notes: list[str] = []
    metrics = ProbabilityMetrics(predict, lambda _: LABELS, "task.py", lambda: ", for batch 2", notes, required=False)
    model = torch.nn.Linear(1, 1)
    assert list(metrics(model, 1)) == ["accuracy", "nll", "brier", "ece"] and not notes
    with pytest.raises(
        TaskError, match=r"must return probabilities \[B, C\], not a tensor of shape \[500\], for batch 2"
    ):
        metrics(model, 2)


def test_the_interval_of_a_difference_of_calibration_errors_covers_the_truth():
    """Population errors are those of a million examples; 88 to 100 % of 95 % intervals cover in longer simulations."""
    draws = torch.Generator().manual_seed(0)

    def scores(count: int) -> list[Score]:
        logits = 1.5 * torch.randn(count, 5, generator=draws, dtype=torch.float64)
        labels = torch.multinomial(logits.softmax(1), 1, generator=draws)[:, 0]
        found: list[Score] = []
        for p in ((1.3 * logits).softmax(1), (1.5 * logits).softmax(1)):
            tally = ScoreAccumulator("max", None, key="ece")
            tally.add(torch.zeros(count), None, count, predicted=probability_metrics(p, labels))
            score = tally.score("it", "val")
            assert score is not None
            assert score.value == pytest.approx(-naive_ece(p.numpy(), labels.numpy()), abs=1e-6)
            found.append(score)
        return found

    first, second = scores(1_000_000)
    truth, covered = second.value - first.value, 0
    for _ in range(100):
        first, second = scores(1000)
        gain = single_gain(second, first)
        assert gain.low is not None and gain.high is not None
        covered += gain.low <= truth <= gain.high
    assert covered >= 89  # three standard deviations below 95


def test_labels_come_from_the_hook_a_pair_or_a_usual_name():
    fields = dataclasses.make_dataclass("Fields", ["x", "target", "index"])(1, 7, 2)
    row = NamedTuple("Row", [("x", int), ("label", int), ("index", int)])(1, 7, 2)
    for batch in ((1, 7), {"x": 1, "labels": 7}, {"y": 7}, fields, row, SimpleNamespace(x=1, labels=None, y=7)):
        assert labels_of(batch, None, "t", "") == 7
    assert labels_of((1, 2, 7), lambda batch: batch[2], "t", "") == 7
    with pytest.raises(TaskError, match="needs labels, but the batch is 3 items") as error:
        labels_of((1, 2, 3), None, "t", "")
    assert error.value.hint is not None and "labels(batch)" in error.value.hint


def test_predict_decides_nothing_until_metric_key_names_a_metric(digits: Path, tmp_path: Path):
    def chosen(more: str) -> tuple[Any, Any]:
        done = ckptavg.best(digits, task=task(tmp_path, more), last=4, output=tmp_path / "x", force=True)
        return [candidate.coefficient for candidate in done.candidates], done.scores["val"]

    plain, with_predict = chosen(""), chosen(PREDICT)
    assert plain[0] == with_predict[0] and plain[1].value == with_predict[1].value == -plain[1].loss
    assert list(with_predict[1].others) == ["accuracy", "nll", "brier", "ece"]
    assert with_predict[1].others["nll"].metric == pytest.approx(plain[1].loss, rel=1e-6)
    _, by_key = chosen(f'{PREDICT}metric_key = "ece"\n')
    assert by_key.name == "ece" and by_key.value == -by_key.metric and "ece" not in by_key.others


def test_all_metrics_are_in_tables_and_json_and_resume_to_the_bit(digits: Path, run: Run, tmp_path: Path):
    arguments = ("compare", digits, "--task", task(tmp_path, PREDICT + NAMED), "--last", 3, "--strategies", "swa")
    options = (*arguments, "--json", "--keep-journal", "--force")
    first, again = run(*options), run(*options)
    assert first.returncode == again.returncode == 0, first.stderr
    report, resumed = json.loads(first.stdout), json.loads(again.stdout)
    names = ["top2", "margin", "accuracy", "nll", "brier", "ece"]
    score, over = (report["strategies"][1][key]["test"] for key in ("scores", "over_last"))
    assert list(score["metrics"]) == names and score["metrics"]["top2"] == score["metric"]
    assert list(over["metrics"]) == names[1:] and over["metrics"]["nll"]["low"] < over["metrics"]["nll"]["high"]
    assert [one["scores"] for one in report["strategies"]] == [one["scores"] for one in resumed["strategies"]]
    assert [one["over_last"] for one in report["strategies"]] == [one["over_last"] for one in resumed["strategies"]]
    assert resumed["scores"] == report["scores"]
    for name in (*names, "test top2", "ece: expected calibration error of the top label, in 15 bins"):
        assert name in " ".join(first.stderr.split())
    shown = run("eval", tmp_path / "averaged.safetensors", "--task", tmp_path / "several.py")
    assert shown.returncode == 0 and all(name in shown.stdout for name in names)


def test_all_metrics_fit_on_80_columns(digits: Path, tmp_path: Path):
    from rich.console import Console

    from ckptavg.report.table import render

    names = ["top2", *(f"recall_at_{k}" for k in range(1, 9))]
    more = f"{PREDICT}\n\ndef metric(model, batch):\n    return dict.fromkeys({names}, loss(model, batch))\n"
    done = ckptavg.compare(digits, ["swa"], task=task(tmp_path, more), last=3, output=tmp_path / "x")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(done))
    text = console.export_text()
    assert not re.search(r"(?<![0-9a-f]{10})…", text)  # only the SHA-256 is abbreviated
    for contestant in done.strategies:
        score = contestant.scores["test"]
        for name, value in score.metrics.items():
            shown = "|".join(re.escape(f"{value:.{places}f}") for places in range(2, 5))
            assert re.search(rf"(^|\s){name}\b", text, re.MULTILINE), name
            assert re.search(rf"(^|\s)({shown})(\s|$)", text, re.MULTILINE), value


def test_names_must_be_the_same_for_every_model(digits: Path, tmp_path: Path):
    more = """
SUMS = []


def metric(model, batch):
    SUMS.append(float(next(model.parameters()).sum()))
    return {"a" if SUMS[-1] == SUMS[0] else "b": loss(model, batch)}
"""
    file = task(tmp_path, more)
    with pytest.raises(TaskError, match="must return the same names for every model and split, not "):
        ckptavg.best(digits, task=file, last=4, output=tmp_path / "x")


def test_a_holdout_has_the_metrics_of_its_part_alone(digits: Path, tmp_path: Path):
    """With labels from the hook, and with early rejection by accuracy."""
    more = """

def labels(batch):
    return batch[1]


metric_key = "accuracy"
metric_bounds = (0.0, 1.0)
del test_dataloader
"""
    file = task(tmp_path, PREDICT + more)
    plain, early = (
        ckptavg.aswa(digits, task=file, last=4, holdout=0.5, early_reject=early, output=tmp_path / f"{early}")
        for early in (False, True)
    )
    assert [one.coefficient for one in plain.candidates] == [one.coefficient for one in early.candidates]
    for score in plain.scores.values():
        assert score.examples is not None and 150 < score.examples < 250
        assert (score.others["brier"].examples, score.others["nll"].metric) == (
            score.examples,
            pytest.approx(score.loss, rel=1e-6),
        )


def test_a_tensor_from_predict_updates_torchmetrics_with_probabilities_and_labels(digits: Path, tmp_path: Path):
    def f1(more: str) -> float:
        source = f"\nfrom torchmetrics.classification import MulticlassF1Score\nmetric = MulticlassF1Score(10)\n{more}"
        metric = (
            ckptavg.last(digits, task=task(tmp_path, source), output=tmp_path / "x", force=True).scores["val"].metric
        )
        assert metric is not None
        return metric

    assert f1("") == f1(PREDICT)


def test_names_that_change_or_do_not_exist_are_refused_with_the_batch():
    tally = ScoreAccumulator("max", None)
    tally.add(torch.zeros(2), {"a": torch.zeros(2)}, 2)
    with pytest.raises(TaskError, match=r"metric\(\) must return the same names for every batch, not b for batch 2"):
        tally.add(torch.zeros(2), {"b": torch.zeros(2)}, 2)
    with pytest.raises(TaskError, match="metric_key names f1, but the metrics are a, b"):
        ScoreAccumulator("max", None, key="f1").add(torch.zeros(2), {"a": 1.0, "b": 2.0}, 2)
    with pytest.raises(TaskError, match="metric_goal names b, but the metrics are one without a name") as error:
        ScoreAccumulator({"b": "min"}, None).add(torch.zeros(2), 1.0, 2)
    assert error.value.hint == 'set metric_goal = "max" or "min", or return {"b": value} from metric()'
    with pytest.raises(TaskError, match="metric_goal names c"):
        ScoreAccumulator({"c": "min"}, None).add(torch.zeros(2), {"a": 1.0}, 2)


def test_goals_by_name_decide_the_sign_of_each_metric():
    tally = ScoreAccumulator({"b": "min"}, None, key="b")
    tally.add(torch.zeros(2), {"a": torch.ones(2), "b": torch.ones(2)}, 2)
    score = tally.score("it", "val")
    assert (score.value, score.metric, score.others["a"].value) == (-1.0, 1.0, 1.0)


def test_a_metric_that_is_nan_leaves_the_deciding_one_valid():
    tally = ScoreAccumulator("max", None)
    tally.add(torch.zeros(2), {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}, 2)
    score = tally.score("it", "val")
    assert score.value == 1.0 and not score.invalid and "metric()['b'] gave nan" in score.others["b"].invalid


def test_a_collection_of_torchmetrics_is_updated_in_one_pass(digits: Path, tmp_path: Path):
    from safetensors.torch import load_file
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

    more = (
        "\nfrom torchmetrics import MetricCollection\n"
        "from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score\n"
        "metric = MetricCollection({'f1': MulticlassF1Score(10), 'acc': MulticlassAccuracy(10)})\nmetric_key = 'acc'\n"
    )
    done = ckptavg.swa(digits, task=task(tmp_path, more), last=2, output=tmp_path / "x")
    import task as demo_task

    model, own = demo_task.model(), {"f1": MulticlassF1Score(10), "acc": MulticlassAccuracy(10)}
    model.load_state_dict(load_file(tmp_path / "x"))
    with torch.no_grad():
        for inputs, labels in demo_task.val_dataloader():
            outputs = model.eval()(inputs)
            for metric in own.values():
                metric.update(outputs, labels)
    score = done.scores["val"]
    assert score.name == "acc" and score.metric == pytest.approx(float(own["acc"].compute()), rel=1e-6)
    assert score.others["f1"].metric == pytest.approx(float(own["f1"].compute()), rel=1e-6)
