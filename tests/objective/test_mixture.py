"""`Mixture` against plain torch: loss, gradient, score, caching and costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import stored
from torch import Tensor, nn

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.errors import TaskError
from ckptavg.journal import Journal
from ckptavg.objective.mixture import Mixture
from ckptavg.runtime.progress import Progress
from ckptavg.score import Score, Split
from ckptavg.surrogate import Surrogate
from ckptavg.tasks import Task
from ckptavg.tasks.batch import size as batch_size
from ckptavg.tasks.batch import to_device
from ckptavg.tasks.torch_metrics import CorpusMetric

CPU = torch.device("cpu")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double()


def data(seed: int, sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(n, 3, generator=draws, dtype=torch.float64) * 2, "y": torch.randint(2, (n,), generator=draws)}
        for n in sizes
    ]


@dataclass
class Toy(Task):
    """A task as a plain object that implements the protocol."""

    splits: Mapping[str, list[dict[str, Tensor]]] = field(
        default_factory=lambda: {"val": data(1, (5, 4)), "train": data(2, (6, 6, 6))}
    )
    source: str = "toy"
    metric: Callable[[nn.Module, Any], Tensor] | None = None
    metric_goal: str = "max"
    metric_bounds: tuple[float, float] | None = None
    metric_key: str | None = None
    corpus: Callable[[], Mapping[str, CorpusMetric]] | None = None
    predict: Callable[[nn.Module, Any], Mapping[str, Tensor]] | None = None
    whole: Callable[[nn.Module], Score] | None = None
    reduction: str = "none"

    def model(self) -> nn.Module:
        return network()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction=self.reduction)

    def has(self, split: Split) -> bool:
        return split in self.splits

    def batches(self, split: Split) -> Iterator[Any]:
        return iter(self.splits[split])

    def examples(self, split: Split) -> int | None:
        return sum(len(batch["y"]) for batch in self.splits[split]) if self.has(split) else None

    def halve(self) -> bool:
        return False

    def length(self, split: Split) -> int | None:
        return len(self.splits[split]) if self.has(split) else None


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Checkpoint, ...]:
    states: list[dict[str, Tensor]] = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = network()
        model(torch.randn(20, 3, dtype=torch.float64) * (seed + 1))  # running statistics that differ per checkpoint
        states.append(model.state_dict())
    return stored(tmp_path, states)


def by_hand(checkpoints: tuple[Checkpoint, ...], c: Tensor) -> dict[str, Tensor]:
    """Return Σ_i c_i w_i of every floating-point tensor, differentiable in c."""
    result: dict[str, Tensor] = {}
    for name in checkpoints[0].names:
        spec = checkpoints[0].spec(name)
        if spec.dtype == "F64":
            rows: list[Tensor] = []
            for checkpoint in checkpoints:
                out = bytearray(spec.nbytes)
                checkpoint.read_into(name, 0, memoryview(out))
                rows.append(torch.frombuffer(out, dtype=torch.float64).view(spec.shape))
            result[name] = torch.einsum("n,n...->...", c, torch.stack(rows))
    return result


def reference_model() -> nn.Module:
    model = network().eval()
    model[1].train()  # BatchNorm by the batch's own statistics, dropout off
    return model


def test_loss_and_gradient_match_torch_with_batch_statistics(checkpoints: tuple[Checkpoint, ...]):
    mixture = Mixture(Toy(), checkpoints, Run(device=CPU))
    task = Toy()
    for batch in task.splits["val"]:
        c = torch.tensor([0.1, 0.5, 0.3, 0.1], dtype=torch.float64, requires_grad=True)
        loss = mixture.losses.loss(c)
        (gradient,) = torch.autograd.grad(2 * loss, c)
        state = {name: t.detach().clone() if "running" in name else t for name, t in by_hand(checkpoints, c).items()}
        logits = torch.func.functional_call(reference_model(), state, (batch["x"],))
        expected = nn.functional.cross_entropy(logits, batch["y"])
        (expected_gradient,) = torch.autograd.grad(2 * expected, c)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("folds", [1, 2, 3, 5, 100])
def test_gradients_of_folds_are_those_of_their_examples(
    checkpoints: tuple[Checkpoint, ...], reduction: str, folds: int
):
    """BatchNorm normalises whole batches, so a fold's losses come from the whole batches of which it has a part."""
    splits = {"val": data(1, (6, 4, 3)), "train": data(2, (6, 6, 6))}
    losses = Mixture(Toy(splits=splits, reduction=reduction), checkpoints, Run(device=CPU)).losses
    row = (0.1, 0.5, 0.6, -0.2)
    c_N = torch.tensor(row, dtype=torch.float64, requires_grad=True)
    state = {name: t.detach().clone() if "running" in name else t for name, t in by_hand(checkpoints, c_N).items()}
    fold_of: dict[int, list[Tensor]] = {}
    dealt = 0
    for batch in splits["val"]:
        logits = torch.func.functional_call(reference_model(), state, (batch["x"],))
        each_B = nn.functional.cross_entropy(logits, batch["y"], reduction="none")
        parts = -(-folds // 3)  # enough for every fold, over the three batches
        if reduction == "mean" or len(each_B) < parts:
            parts = 1
        for part in range(parts):
            own_B = each_B[part::parts]
            fold_of.setdefault((dealt + part) % folds, []).append(own_B)
        dealt += parts
    expected = [torch.cat(own) for _, own in sorted(fold_of.items())]
    slopes = [torch.autograd.grad(own.mean(), c_N, retain_graph=True)[0] for own in expected]
    examples_F, value_F, gradient_FN = losses.gradients(Coefficients((row,)), folds=folds)
    assert examples_F.tolist() == [len(own) for own in expected] and examples_F.sum() == 13
    torch.testing.assert_close(value_F, torch.stack([own.detach().mean() for own in expected]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_FN, torch.stack([s - s.mean() for s in slopes]), rtol=1e-10, atol=1e-12)
    value, gradient_N = losses.gradient(Coefficients((row,)))
    assert float(examples_F @ value_F) / 13 == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(examples_F @ gradient_FN / 13, gradient_N, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("reduction", "most"), [("none", 8), ("mean", 5)])
def test_there_are_as_many_folds_as_the_losses_allow(checkpoints: tuple[Checkpoint, ...], reduction: str, most: int):
    """Five batches have 5 losses, or as many parts as are asked for."""
    splits = {"val": data(1, (3, 3, 3, 2, 2))}
    losses = Mixture(Toy(splits=splits, reduction=reduction), checkpoints, Run(device=CPU)).losses
    mean = Coefficients.uniform(range(4), 4)
    for folds in range(1, 9):
        examples_F, _, _ = losses.gradients(mean, folds=folds)
        assert len(examples_F) == min(folds, most) and examples_F.sum() == 13


def test_an_interrupted_run_has_the_derivatives_of_the_journal_and_repeats_no_batch(
    checkpoints: tuple[Checkpoint, ...], tmp_path: Path
):
    found: list[tuple[Surrogate, tuple[Tensor, ...]]] = []
    for batches in (2, 0):  # of data: the second run has none, and needs none
        task = Toy(splits={"val": data(1, (5, 4))[:batches]})
        with Journal(tmp_path / "out", resume=True, keep=True) as journal:
            journal.begin({"run": 1})
            losses = Mixture(task, checkpoints, Run(device=CPU, journal=journal)).losses
            two = [losses.gradients(Coefficients.uniform([0, 2], 4), folds=folds) for folds in (3, 2)]
            found.append((losses.surrogate(examples=5), (*two[0], *two[1])))
    (q, first), (resumed, second) = found
    assert torch.equal(q.hessian_NN, resumed.hessian_NN) and torch.equal(q.gradient_N, resumed.gradient_N)
    assert (q.value, q.curvature, q.note) == (resumed.value, resumed.curvature, resumed.note)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("examples", "batches"), [(1, 1), (5, 1), (6, 2), (9, 2), (100, 2), (None, 2)])
def test_a_surrogate_of_some_examples_uses_as_few_whole_batches(
    checkpoints: tuple[Checkpoint, ...], examples: int | None, batches: int
):
    mixture = Mixture(Toy(), checkpoints, Run(device=CPU))
    q = mixture.losses.surrogate(examples=examples)
    few = Mixture(Toy(splits={"val": data(1, (5, 4))[:batches]}), checkpoints, Run(device=CPU))
    expected = few.losses.surrogate()
    assert torch.equal(q.hessian_NN, expected.hessian_NN) and q.value == expected.value
    spent, least = mixture.cost(), few.cost()
    assert (spent.forward_batches, spent.backward_batches) == (least.forward_batches, least.backward_batches)


def test_score_matches_torch_with_recomputed_statistics(checkpoints: tuple[Checkpoint, ...]):
    mixture = Mixture(Toy(), checkpoints, Run(device=CPU))
    row = (0.25, 0.25, 0.25, 0.25)
    model = network()
    model.load_state_dict({**model.state_dict(), **by_hand(checkpoints, torch.tensor(row, dtype=torch.float64))})
    torch.optim.swa_utils.update_bn([batch["x"] for batch in Toy().splits["train"]], model.eval())
    # update_bn runs with dropout on; here it comes after BatchNorm and does not affect it
    model.eval()
    with torch.no_grad():
        parts = [nn.functional.cross_entropy(model(b["x"]), b["y"], reduction="sum") for b in Toy().splits["val"]]
    score = mixture.score(Coefficients((row,)))
    assert score.examples == 9 and score.metric is None and score.value == -score.loss
    assert score.loss == pytest.approx(float(sum(parts)) / 9, rel=1e-12)


def test_a_score_does_not_depend_on_earlier_calls(checkpoints: tuple[Checkpoint, ...]):
    alone = Coefficients.uniform([1], 4)
    fresh = Mixture(Toy(), checkpoints, Run(device=CPU)).score(alone)
    busy = Mixture(Toy(), checkpoints, Run(device=CPU))
    busy.score(Coefficients.uniform([0, 3], 4))
    busy.losses.loss(busy.losses.uniform())
    assert busy.score(alone) == fresh


def test_a_score_is_cached_and_costs_nothing_when_repeated(checkpoints: tuple[Checkpoint, ...]):
    mixture = Mixture(Toy(), checkpoints, Run(device=CPU))
    first = mixture.score(Coefficients.uniform([0], 4))
    spent = mixture.cost().forward_batches
    assert spent == 2 + 3  # validation batches, plus training batches for BatchNorm
    assert mixture.score(Coefficients.uniform([0], 4)) is first and mixture.cost().forward_batches == spent


def test_cost_in_epochs_counts_a_backward_as_two_forwards(checkpoints: tuple[Checkpoint, ...]):
    mixture = Mixture(Toy(), checkpoints, Run(device=CPU))
    for _ in range(3):
        mixture.losses.loss(mixture.losses.uniform(), "train")  # one epoch: 3 batches of 6
    cost = mixture.cost()
    assert (cost.forward_batches, cost.backward_batches, cost.epochs, cost.epochs_of) == (3, 3, 1.0, "train")


def test_the_stream_of_batches_repeats(checkpoints: tuple[Checkpoint, ...]):
    mixture = Mixture(Toy(), checkpoints, Run(device=CPU))
    losses = [float(mixture.losses.loss(mixture.losses.uniform())) for _ in range(4)]
    assert losses[:2] == losses[2:] and losses[0] != losses[1]


@pytest.mark.parametrize(("goal", "sign"), [("max", 1), ("min", -1)])
def test_the_score_is_the_metric_if_the_task_has_one(checkpoints: tuple[Checkpoint, ...], goal: str, sign: int):
    def hits(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"]).argmax(dim=1) == batch["y"]).double()

    score = Mixture(Toy(metric=hits, metric_goal=goal), checkpoints, Run(device=CPU)).score(
        Coefficients.uniform([0], 4)
    )
    assert score.metric is not None and score.value == sign * score.metric


def test_a_mean_loss_is_weighted_by_the_size_of_its_batch(checkpoints: tuple[Checkpoint, ...]):
    coefficients = Coefficients.uniform([2], 4)
    each = Mixture(Toy(), checkpoints, Run(device=CPU)).score(coefficients)
    mean = Mixture(Toy(reduction="mean"), checkpoints, Run(device=CPU)).score(coefficients)
    assert mean.loss == pytest.approx(each.loss, rel=1e-12)


def test_training_data_are_scored_without_validation_data(checkpoints: tuple[Checkpoint, ...]):
    mixture = Mixture(Toy(splits={"train": data(2, (6, 6))}), checkpoints, Run(device=CPU))
    assert mixture.scored_on == "train" and mixture.score(Coefficients.uniform([0], 4)).examples == 12


def test_batchnorm_is_recomputed_on_validation_data_without_training_data(checkpoints: tuple[Checkpoint, ...]):
    mixture = Mixture(Toy(splits={"val": data(1, (5, 4))}), checkpoints, Run(device=CPU))
    mixture.score(Coefficients.uniform([0], 4))
    cost = mixture.cost()
    assert cost.epochs_of == "val" and cost.forward_batches == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_score_names_the_mixture(checkpoints: tuple[Checkpoint, ...], bad: float):
    def nonfinite(model: nn.Module, batch: Any) -> Tensor:
        return torch.full((len(batch["y"]),), bad)

    mixture = Mixture(Toy(metric=nonfinite), checkpoints, Run(device=CPU))
    alone, both = (mixture.score(Coefficients.uniform(chosen, 4)) for chosen in ([2], [0, 2]))
    reason = r"metric\(\) gave (nan|inf) in batch 1 of the val data"
    assert re.fullmatch(rf"candidate .*step-2\.safetensors: {reason}", alone.invalid)
    assert re.fullmatch(f"the mixture of steps 0, 2: {reason}", both.invalid)
    assert alone.value == both.value == -float("inf")
    with pytest.raises(TaskError, match=f"^toy: the average: {reason}"):
        mixture.scoring.evaluate("val", "the average")


def test_progress_is_throttled_but_always_reported_at_the_end(checkpoints: tuple[Checkpoint, ...]):
    reports: list[tuple[str, int, int, Mapping[str, float]]] = []
    mixture = Mixture(Toy(), checkpoints, Run(device=CPU, progress=Progress(lambda *report: reports.append(report))))
    for step in range(1, 1001):
        mixture.progress("learning", step, 1000, loss=torch.tensor(0.5))
    assert reports[-1] == ("learning", 1000, 1000, {"loss": 0.5}) and len(reports) < 100


def test_candidates_are_loaded_lazily(checkpoints: tuple[Checkpoint, ...]):
    class Unused(Toy):
        def model(self) -> nn.Module:
            raise AssertionError("was made")

    mixture = Mixture(Unused(), checkpoints, Run(device=CPU))
    assert mixture.n == 4 and mixture.losses.uniform().tolist() == [0.25] * 4


def test_batches_may_be_any_nesting():
    from collections import namedtuple

    Pair = namedtuple("Pair", "a b")
    batch = {"x": [torch.ones(3, 2), "text"], "y": (Pair(torch.zeros(3), None), 4)}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"][0].device.type == "meta" and moved["x"][1] == "text" and moved["y"][1] == 4
    assert type(moved["y"][0]) is Pair and moved["y"][0].a.device.type == "meta"
    assert batch_size(batch) == 3 and batch_size(("text", (torch.ones(5),))) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_losses_and_gradients_on_cuda_match_the_cpu(checkpoints: tuple[Checkpoint, ...]):
    results: list[tuple[float, list[float]]] = []
    for device in ("cpu", "cuda"):
        mixture = Mixture(Toy(), checkpoints, Run(device=torch.device(device)))
        c = mixture.losses.uniform().requires_grad_()
        loss = mixture.losses.loss(c)
        loss.backward()
        assert c.grad is not None and c.grad.device.type == device
        results.append((float(loss.detach()), c.grad.tolist()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-9)
