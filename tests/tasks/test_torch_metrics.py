"""torchmetrics over batches and over resamples of them, against torchmetrics on the same data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckptavg.errors import TaskError
from ckptavg.journal.tensor_json import decode, encode
from ckptavg.tasks.torch_metrics import CorpusMetric, is_torchmetric, metric_goal

pytest.importorskip("torchmetrics")
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score
from torchmetrics.functional import accuracy
from torchmetrics.regression import MeanSquaredError
from torchmetrics.text import CharErrorRate

SIZES = (5, 7, 3, 8)
RESAMPLES = ([0, 1, 2, 3], [3, 3, 0, 1], [2, 1], [1, 1, 1, 1])


class Largest(Metric):
    """Metric with states reduced by max, min and mean, and a list state that is concatenated."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("high", torch.tensor(-torch.inf), dist_reduce_fx="max")
        self.add_state("low", torch.tensor(torch.inf), dist_reduce_fx="min")
        self.add_state("seen", [], dist_reduce_fx=None)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.high = torch.maximum(self.high, outputs.max())
        self.low = torch.minimum(self.low, outputs.min())
        self.seen.append(outputs.sum())

    def compute(self) -> Tensor:
        return self.high - self.low + sum(self.seen)


class Forgetful(Metric):
    """Metric without dist_reduce_fx, which therefore works in one process only."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0))

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += outputs.sum()

    def compute(self) -> Tensor:
        return self.total.sum() if self.total.ndim == 0 else self.total.max()


class InPlace(Largest):
    """Metric whose `reset` clears its tensors in place."""

    def reset(self) -> None:
        self.high.fill_(-torch.inf)
        self.low.fill_(torch.inf)
        self.seen.clear()
        self._computed = None

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        torch.maximum(self.high, outputs.max(), out=self.high)
        torch.minimum(self.low, outputs.min(), out=self.low)
        self.seen.append(outputs.sum())


def classes(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4, generator=generator), torch.randint(4, (size,), generator=generator)


def binary(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(2, (size,), generator=generator)
    labels[:2] = torch.tensor([0, 1])  # both classes in every batch, else the curve is undefined
    return torch.rand(size, generator=generator), labels


def numbers(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator)


def texts(generator: torch.Generator, size: int) -> tuple[list[str], list[str]]:
    words = ["abc", "bcdef", "x", "some words"]
    drawn = torch.randint(4, (2, size), generator=generator).tolist()
    return [words[i] for i in drawn[0]], [words[i] for i in drawn[1]]


CASES: dict[str, tuple[Callable[[], Any], Callable[[torch.Generator, int], tuple[Any, Any]], str | None]] = {
    "accuracy-micro": (lambda: MulticlassAccuracy(4, average="micro"), classes, "max"),
    "accuracy-macro": (lambda: MulticlassAccuracy(4, average="macro"), classes, "max"),
    "f1-macro": (lambda: MulticlassF1Score(4, average="macro"), classes, "max"),
    "auroc": (BinaryAUROC, binary, "max"),
    "auroc-binned": (lambda: BinaryAUROC(thresholds=20), binary, "max"),
    "mse": (MeanSquaredError, numbers, "min"),
    "rmse": (lambda: MeanSquaredError(squared=False), numbers, "min"),
    "pearson": (PearsonCorrCoef, numbers, None),
    "max-min-list": (Largest, numbers, "min"),
    "in-place": (InPlace, numbers, "min"),
    "composed": (lambda: 2 * MeanSquaredError() + PearsonCorrCoef(), numbers, None),
    "char-error": (CharErrorRate, texts, "min"),
}


def filled(name: str) -> tuple[CorpusMetric, list[tuple[Any, Any]]]:
    make, draw, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)
    batches = [draw(generator, size) for size in SIZES]
    corpus = CorpusMetric(make(), source="task.py")
    for batch in batches:
        corpus.update(nn.Identity(), batch)
    return corpus, batches


def reference(name: str, batches: list[tuple[Any, Any]]) -> float:
    metric = CASES[name][0]()
    for batch in batches:
        metric.update(*batch)
    return float(metric.compute())


@pytest.mark.parametrize("name", CASES)
def test_compute_matches_torchmetrics(name: str):
    corpus, batches = filled(name)
    assert corpus.compute() == reference(name, batches)


@pytest.mark.parametrize("name", CASES)
def test_a_resample_matches_torchmetrics_on_those_batches(name: str):
    corpus, batches = filled(name)
    for indices in RESAMPLES:
        expected = reference(name, [batches[i] for i in indices])
        # sums of at most 32 float32 numbers in another order; the largest condition number here is Pearson's, about 10
        assert corpus.resampled(indices) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert corpus.compute() == reference(name, batches)  # resampling did not change the states


def test_a_resample_is_not_a_mean_of_batch_values():
    corpus, batches = filled("f1-macro")
    mean = sum(reference("f1-macro", [batches[i]]) for i in (0, 1)) / 2
    assert abs(corpus.resampled([0, 1]) - mean) > 1e-3


def test_the_tasks_metric_is_never_modified_and_what_it_has_seen_does_not_count():
    metric = MulticlassAccuracy(4)
    metric.update(*classes(torch.Generator().manual_seed(9), 20))
    seen = metric.compute()
    for seed in range(2):
        batch = classes(torch.Generator().manual_seed(seed), 20)
        corpus = CorpusMetric(metric, source="task.py")
        corpus.update(nn.Identity(), batch)
        assert corpus.batches == 1 and corpus.compute() == reference("accuracy-macro", [batch])
    assert metric.update_count == 1 and metric.compute() == seen


@pytest.mark.parametrize("name", CASES)
def test_states_that_were_saved_as_json_give_the_same_values(name: str):
    corpus, _ = filled(name)
    restored = CorpusMetric(CASES[name][0](), source="task.py")
    restored.load_state_dict(decode(json.loads(json.dumps(encode(corpus.state_dict())))))
    assert restored.batches == corpus.batches and restored.compute() == corpus.compute()
    assert [restored.resampled(indices) for indices in RESAMPLES] == [corpus.resampled(i) for i in RESAMPLES]


@pytest.mark.parametrize("name", CASES)
def test_the_goal_follows_higher_is_better(name: str):
    make, _, goal = CASES[name]
    assert metric_goal(make()) == goal


def test_the_model_runs_without_gradients_on_the_inputs_of_a_pair():
    model = nn.Linear(3, 4)
    inputs, targets = torch.randn(9, 3), torch.arange(9) % 4
    corpus = CorpusMetric(MulticlassAccuracy(4), source="task.py")
    corpus.update(model, [inputs, targets])
    with torch.no_grad():
        assert corpus.compute() == reference("accuracy-macro", [(model(inputs), targets)])


def test_predict_returns_the_arguments_for_any_batch():
    batch = {"x": torch.randn(6, 4), "y": torch.arange(6) % 4}
    corpus = CorpusMetric(MulticlassAccuracy(4), source="t", predict=lambda model, b: (model(b["x"]), b["y"]))
    corpus.update(nn.Identity(), batch)
    assert corpus.compute() == reference("accuracy-macro", [(batch["x"], batch["y"])])


def test_detection_uses_the_class_and_not_the_name():
    assert is_torchmetric(MulticlassAccuracy(4)) and is_torchmetric(Largest()) and is_torchmetric(MetricCollection([]))
    assert is_torchmetric(MeanSquaredError() + 1)
    for other in (accuracy, MulticlassAccuracy, nn.Linear(1, 1), lambda model, batch: 0.0, None):
        assert not is_torchmetric(other)


def failure(metric: Any, batch: Any = None, *, model: Any = None, **options: Any) -> TaskError:
    with pytest.raises(TaskError) as error:
        corpus = CorpusMetric(metric, source="task.py", **options)
        corpus.update(model or nn.Identity(), batch or (torch.ones(2), torch.ones(2)))
        corpus.resampled([0])
    assert str(error.value).startswith("task.py: ") and "\n" not in str(error.value)
    return error.value


def test_every_failure_is_a_one_line_task_error():
    wrong = failure(MeanSquaredError(), {"x": 1})
    assert "not a dict" in str(wrong) and wrong.hint is not None and "define predict(model, batch)" in wrong.hint
    assert "not 3 items" in str(failure(MeanSquaredError(), (1, 2, 3)))
    assert "a tuple, not Tensor" in str(failure(MeanSquaredError(), predict=lambda model, batch: batch[0]))
    assert "in predict: ZeroDivisionError" in str(failure(MeanSquaredError(), predict=lambda model, batch: 1 / 0))
    assert "in the model: RuntimeError" in str(failure(MeanSquaredError(), model=nn.Linear(3, 1)))
    assert "in MulticlassAccuracy.update: " in str(failure(MulticlassAccuracy(4), (torch.ones(2, 3), torch.ones(5))))
    assert "the metric is nan" in str(failure(MeanSquaredError(), (torch.tensor([torch.nan]), torch.ones(1))))
    scores = (torch.eye(4), torch.arange(4))
    assert "not a tensor of shape [4]" in str(failure(MulticlassAccuracy(4, average=None), scores))


def test_compute_without_batches_is_an_error():
    corpus = CorpusMetric(MeanSquaredError(), source="task.py")
    for ask in (corpus.compute, lambda: corpus.resampled([])):
        with pytest.raises(TaskError):
            ask()


def test_states_that_cannot_be_merged_are_an_error():
    corpus = CorpusMetric(Forgetful(), source="task.py")
    for value in (1.0, 2.0):
        corpus.update(nn.Identity(), (torch.tensor([value]), torch.ones(1)))
    assert corpus.compute() == 3.0
    with pytest.raises(TaskError, match="states of Forgetful cannot be merged") as error:
        corpus.resampled([0, 1])
    assert error.value.hint is not None and "dist_reduce_fx" in error.value.hint


def test_torchmetrics_warnings_in_a_resample_are_suppressed():
    corpus = CorpusMetric(BinaryAUROC(), source="task.py")
    for labels in ([0, 1], [1, 1]):
        corpus.update(nn.Identity(), (torch.tensor([0.2, 0.9]), torch.tensor(labels)))
    assert corpus.resampled([1, 1]) == 0.0  # no negatives: torchmetrics warns, and warnings are errors here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_metric_moves_to_the_device_of_its_arguments():
    outputs, targets = torch.randn(8, 4, device="cuda"), torch.arange(8, device="cuda") % 4
    for make in (lambda: MulticlassAccuracy(4), lambda: 2 * MeanSquaredError()):
        corpus = CorpusMetric(make(), source="task.py")
        pair = (outputs, targets) if isinstance(make(), MulticlassAccuracy) else (outputs[:, 0], outputs[:, 1])
        corpus.update(nn.Identity(), pair)
        own = make().to("cuda")
        own.update(*pair)
        assert corpus.compute() == float(own.compute()) == pytest.approx(corpus.resampled([0]))


def test_importing_the_module_does_not_import_torchmetrics():
    code = "import ckptavg.tasks.torch_metrics, sys; print('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
