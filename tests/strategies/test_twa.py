"""TWA: β against methods.md's formula, the optimum of a convex problem against scipy's, each setting by its effect."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective.test_mixture import Toy
from quadratic import Quadratic
from scipy.optimize import minimize
from stored import stored
from torch import Tensor, nn

from ckptavg.coefficients import EVERYTHING, Coefficients
from ckptavg.context import Run
from ckptavg.errors import UsageError
from ckptavg.objective.mixture import Mixture
from ckptavg.score import Score, Split
from ckptavg.strategies.solvers.subspace import Subspace, default_epochs
from ckptavg.strategies.twa import TWA

CONSTRAINTS = ("affine", "simplex")


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(-8, 4))
def test_affine_coefficients_are_the_formula(seed: int, n: int, magnitude: float):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=draws, dtype=torch.float64)
    distance = (torch.rand(n, generator=draws, dtype=torch.float64) + 0.1) * 10**magnitude
    beta = Subspace(distance, "affine").coefficients(x)
    y = [a / b for a, b in zip(x.tolist(), distance.tolist(), strict=True)]
    # each β is a sum of three terms, the largest |y|: their roundings and those of the mean
    tolerance = (n + 4) * 2**-53 * (1 / n + 2 * max(map(abs, y)))
    for i in range(n):
        assert abs(beta[i].item() - (1 / n + y[i] - math.fsum(y) / n)) <= tolerance
    assert abs(beta.sum().item() - 1) <= n * tolerance


def test_affine_coefficients_are_the_mean_and_the_unit_directions():
    """Check Σ_i β_i w_i = w̄ + Σ_i x_i p_i on explicit vectors."""
    objective = Quadratic(n=6, d=9, seed=0)
    w, mean = objective.weights_ND, objective.weights_ND.mean(dim=0)
    x = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    directions = (w - mean) / (w - mean).norm(dim=1, keepdim=True)
    beta = Subspace(objective.distances(EVERYTHING)[0], "affine").coefficients(x)
    torch.testing.assert_close(beta @ w, mean + x @ directions, rtol=0, atol=1e-14)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(-3, 2))
def test_simplex_coefficients_are_not_negative_and_sum_to_one(seed: int, n: int, magnitude: float):
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**magnitude
    beta = Subspace(torch.ones_like(x), "simplex").coefficients(x)
    assert (beta >= 0).all() and torch.allclose(beta.sum(dim=1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(beta, torch.softmax(n * x, dim=1), rtol=1e-12, atol=0)


def test_both_constraints_start_in_the_same_direction():
    """A learning rate has the same effect in both: ∂β/∂x at x = 0 is the same matrix."""
    distance = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    affine, simplex = (
        torch.autograd.functional.jacobian(Subspace(distance, constraint).coefficients, zero)
        for constraint in CONSTRAINTS
    )
    torch.testing.assert_close(affine, simplex, rtol=0, atol=1e-15)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_candidate_that_is_the_mean_has_no_direction(constraint: Any):
    x = torch.tensor([3.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    distance = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    beta = Subspace(distance, constraint).coefficients(x)
    beta.square().sum().backward()
    assert torch.isfinite(beta).all() and x.grad is not None and x.grad[0] == 0 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_identical_candidates_are_averaged(constraint: Any):
    objective = Quadratic(n=4, d=3, seed=0)
    objective.weights_ND = objective.weights_ND[:1].expand(4, 3)
    assert TWA(constraint=constraint).learn(objective).coefficients.values == ((0.25,) * 4,)


def literal(
    objective: Quadratic, steps: int, lr: float, *, optimizer: str, decay: float, clip: float | None
) -> list[Tensor]:  # fmt: skip
    """Return x after each step on a quadratic, with AdamW or SGD, schedule and gradient written out."""
    w, n = objective.weights_ND, objective.n
    mean = w.mean(dim=0)
    p = (w - mean) / (w - mean).norm(dim=1, keepdim=True)
    x = torch.zeros(n, dtype=torch.float64)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    warm, every = steps // 5, list[Tensor]()
    for t in range(steps):
        rate = lr * ((t + 1) / warm if t < warm else (1 + math.cos(math.pi * (t - warm) / (steps - warm))) / 2)
        g = p @ (2 / objective.d * (mean + x @ p))
        if clip is not None:
            g = g * min(1.0, clip / (g.norm().item() + 1e-6))
        if optimizer == "adamw":
            x = x * (1 - rate * decay)
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            m, v = first / (1 - 0.9 ** (t + 1)), second / (1 - 0.999 ** (t + 1))
            x = x - rate * m / (v.sqrt() + 1e-8)
        else:
            g = g + decay * x
            first = g if t == 0 else 0.9 * first + g
            x = x - rate * first
        every.append(x)
    return every


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("decay", "clip"), [(0.0, None), (0.1, 0.2)])
def test_trained_coefficients_match_the_update_written_out(optimizer: Any, decay: float, clip: float | None):
    objective = Quadratic(n=5, d=7, seed=2)
    settings_ = TWA(epochs=4, lr=0.05, optimizer=optimizer, weight_decay=decay, clip=clip)
    xs = literal(objective, 4 * objective.batches("val"), 0.05, optimizer=optimizer, decay=decay, clip=clip)
    subspace = Subspace(objective.distances(EVERYTHING)[0], "affine")
    epochs = [subspace.coefficients(x) for x in xs[objective.batches("val") - 1 :: objective.batches("val")]]
    expected = min(epochs, key=lambda beta: float(objective.loss(beta)))
    found = torch.tensor(settings_.learn(objective).coefficients.values[0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("layerwise", [False, True])
def test_training_comes_close_to_the_optimum_of_a_quadratic(constraint: Any, layerwise: bool):
    objective = Quadratic(n=8, d=5, seed=4)
    rate = 0.02 if layerwise else 0.1  # a softmax in one dimension needs small steps
    learned = TWA(constraint=constraint, epochs=300, lr=rate, layerwise=layerwise).learn(objective).coefficients
    assert learned.groups == (objective.blocks(None) if layerwise else EVERYTHING)
    start = -objective.score(Coefficients.uniform(range(8), 8)).value
    reached = -objective.score(learned).value
    if constraint == "affine":  # eight points in five dimensions, or in one: zero is among the combinations
        assert reached < 1e-6 < start
    elif layerwise:  # the number nearest to zero between the smallest and the largest, in each dimension
        low, high = objective.weights_ND.amin(dim=0), objective.weights_ND.amax(dim=0)
        best = float(torch.zeros_like(low).clamp(low, high).square().mean())
        assert reached < best + 1e-4 < start
    else:
        best = minimize(
            lambda z: float(objective.loss(torch.softmax(torch.tensor(z), 0))), np.zeros(8), method="Nelder-Mead",
            options={"maxfev": 20000, "xatol": 1e-9, "fatol": 1e-12},
        ).fun  # fmt: skip
        assert reached < best + 1e-4 < start
    if constraint == "simplex":
        assert all(c >= 0 for row in learned.values for c in row)


def test_the_default_rate_does_not_depend_on_the_scale_of_the_weights():
    """x is measured in units of the mean distance, so scaled weights follow the same trajectory."""
    small, large = (TWA().learn(Quadratic(n=5, d=4, seed=1, scale=scale)) for scale in (1.0, 1000.0))
    for a, b in zip(small.coefficients.values[0], large.coefficients.values[0], strict=True):
        assert a == pytest.approx(b, abs=1e-7)  # AdamW's ε does not scale
    assert small.coefficients != Coefficients.uniform(range(5), 5)


class Logistic:
    """Logistic regression on one full batch: convex in the coefficients."""

    def __init__(self, folder: Path) -> None:
        draws = torch.Generator().manual_seed(0)
        self.x = torch.randn(200, 6, generator=draws, dtype=torch.float64)
        truth = torch.randn(6, generator=draws, dtype=torch.float64)
        noise = torch.randn(200, generator=draws, dtype=torch.float64)
        self.y = (self.x @ truth + noise > 0).to(torch.int64)
        states = [
            {
                "weight": truth * torch.tensor([[-0.5], [0.5]], dtype=torch.float64)
                + torch.randn(2, 6, generator=draws, dtype=torch.float64),
                "bias": torch.randn(2, generator=draws, dtype=torch.float64),
            }
            for _ in range(7)
        ]
        self.checkpoints = stored(folder, states)
        self.weights = np.stack([state["weight"].numpy() for state in states])
        self.biases = np.stack([state["bias"].numpy() for state in states])

    def task(self) -> Any:
        batch = {"x": self.x, "y": self.y}

        class Linear(Toy):
            def model(self) -> nn.Module:
                return nn.Linear(6, 2).double()

        return Linear(splits={"val": [batch]})

    def loss(self, c: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean cross-entropy and its gradient in c, in numpy."""
        x, y = self.x.numpy(), self.y.numpy()
        logits = x @ np.tensordot(c, self.weights, 1).T + c @ self.biases
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        by_logits = (p - np.eye(2)[y]) / len(y)
        each = np.einsum("nki,bi->bnk", self.weights, x) + self.biases  # logits of each candidate
        return float(-np.log(p[np.arange(len(y)), y]).mean()), np.einsum("bnk,bk->n", each, by_logits)


def test_on_a_convex_problem_simplex_twa_reaches_the_optimum_of_slsqp(tmp_path: Path):
    problem = Logistic(tmp_path)
    solved = minimize(
        problem.loss, np.full(7, 1 / 7), jac=True, method="SLSQP", bounds=[(0, 1)] * 7,
        constraints={"type": "eq", "fun": lambda c: c.sum() - 1, "jac": lambda c: np.ones(7)},
        options={"ftol": 1e-14, "maxiter": 1000},
    )  # fmt: skip
    assert solved.success and min(solved.x) < 1e-6 < max(solved.x) < 0.99  # on the boundary, not at a corner
    mixture = Mixture(problem.task(), problem.checkpoints, Run(device=torch.device("cpu")))
    learned = TWA(constraint="simplex", on="val", epochs=800, lr=0.1).learn(mixture).coefficients
    assert mixture.score(learned).loss == pytest.approx(solved.fun, abs=1e-4)
    assert np.allclose(learned.values[0], solved.x, atol=1e-2)
    assert mixture.score(Coefficients.uniform(range(7), 7)).loss > solved.fun + 0.01


def test_a_sam_step_uses_the_gradient_at_the_shifted_point_on_the_same_batch():
    asked: list[tuple[Tensor, bool]] = []

    class Watched(Quadratic):
        def loss(self, c_N: Tensor, on: Split | None = None, **options: Any) -> Tensor:
            if "again" in options:  # not a score
                asked.append((c_N.detach().clone(), options["again"]))
            return super().loss(c_N, on, **options)

    objective = Watched(n=4, d=6, seed=3)
    learned = TWA(epochs=1, lr=0.01, sam_rho=0.5, optimizer="sgd").learn(objective)
    assert [again for _, again in asked] == [False, True] * 3 and len(learned.trace["loss"]) == 3
    w, mean = objective.weights_ND, objective.weights_ND.mean(dim=0)
    p = (w - mean) / (w - mean).norm(dim=1, keepdim=True)
    gradient = p @ (2 / 6 * mean)
    shifted = 0.5 * gradient / gradient.norm()
    expected = Subspace(objective.distances(EVERYTHING)[0], "affine").coefficients(shifted)
    torch.testing.assert_close(asked[1][0], expected, rtol=0, atol=1e-12)
    step = -0.01 * (p @ (2 / 6 * (mean + shifted @ p)))  # three steps: no warm-up, the first at the full rate
    torch.testing.assert_close(
        asked[2][0], Subspace(objective.distances(EVERYTHING)[0], "affine").coefficients(step), rtol=0, atol=1e-12
    )


class Held(Quadratic):
    """An objective whose held-out scores follow a script and ignore the coefficients."""

    def __init__(self, script: list[float]) -> None:
        super().__init__(n=4, d=3, seed=0)
        self.script = iter(script)
        self.fitted: set[Split | None] = set()
        self.watched: list[tuple[Split | None, Coefficients]] = []

    def loss(self, c_N: Tensor, on: Split | None = None, **options: Any) -> Tensor:
        self.fitted.add(on)
        return super().loss(c_N, on, **options)

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        self.watched.append((on, coefficients))
        value = next(self.script)
        return Score(value=value, loss=-value, metric=None, examples=1)


def test_patience_stops_on_held_out_data_and_returns_the_best_epoch():
    objective = Held([0.0, 1.0, 3.0, 2.0, 3.0, 9.0])  # a tie is not an improvement
    learned = TWA(patience=2, epochs=50, on="val").learn(objective)
    assert learned.trace["scored_loss"] == [0.0, -1.0, -3.0, -2.0, -3.0]
    assert learned.trace["scored_step"] == [0, 3, 6, 9, 12] and len(learned.trace["loss"]) == 4 * 3
    assert learned.coefficients == objective.watched[2][1]
    assert objective.fitted == {"fit"} and {on for on, _ in objective.watched} == {"held"}


def test_training_without_improvement_returns_the_mean():
    learned = TWA(patience=1).learn(Held([0.0, -1.0]))
    assert learned.coefficients == Coefficients.uniform(range(4), 4)


def test_patience_on_training_data_monitors_all_validation_data():
    objective = Held([0.0, 1.0, 0.0])
    TWA(patience=1, on="train").learn(objective)
    assert objective.fitted == {"train"} and {on for on, _ in objective.watched} == {"val"}


def test_coefficients_far_outside_are_reported():
    objective = Quadratic(n=3, d=2, seed=0)
    objective.weights_ND = torch.tensor([[1.0, 1.0], [1.1, 1.0], [1.0, 1.2]], dtype=torch.float64)  # zero is far away
    (note,) = TWA(lr=0.5, epochs=300).learn(objective).notes
    assert "outside [−1, 2]" in note and "--constraint simplex" in note
    (note,) = TWA(lr=0.5, epochs=300, constraint="simplex").learn(objective).notes
    assert note == "the answer is the best single candidate, not a step of the training"


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"patience": 0}, "--patience"),
        ({"block_size": -1}, "--block-size"),
        ({"lr": 0.0}, "--lr"),
        ({"lr": math.nan}, "--lr"),
        ({"clip": -1.0}, "--clip"),
        ({"sam_rho": -0.1}, "--sam-rho"),
        ({"weight_decay": math.inf}, "--weight-decay"),
    ],
)
def test_invalid_settings_are_refused(settings_: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        TWA(**settings_)


def test_a_block_size_implies_layer_wise():
    assert len(TWA(block_size=0, epochs=1).learn(Quadratic(n=3, d=4, seed=0)).coefficients.groups) == 4


def test_a_single_candidate_is_returned():
    assert TWA(epochs=1).learn(Quadratic(n=1, d=4, seed=0)).coefficients.values == ((1.0,),)


def test_training_batches_come_from_the_training_split():
    seen = SimpleNamespace(on=None)

    class Watched(Quadratic):
        def loss(self, c_N: Tensor, on: Split | None = None, **options: Any) -> Tensor:
            seen.on = on if "again" in options else seen.on  # a score has no batch
            return super().loss(c_N, on, **options)

    TWA(on="train", epochs=1).learn(Watched(n=3, d=2, seed=0))
    assert seen.on == "train"
    TWA(epochs=1).learn(Watched(n=3, d=2, seed=0))
    assert seen.on == "val"


def test_few_steps_are_said():
    """Ten epochs of one batch leave the coefficients almost where they began."""
    for epochs, few in ((10, True), (40, False)):  # of 3 batches
        notes = TWA(epochs=epochs).learn(Quadratic(n=6, d=9, seed=0)).notes
        assert any(f"only {3 * epochs} steps" in note for note in notes) is few


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("n", [5, 50, 300])
def test_the_answer_is_never_above_the_mean_or_a_single_candidate_and_has_no_dead_gradient(n: int, constraint: Any):
    """A rate of 0.02 moved softmax(N·x) by 0.02·N a step, onto one of 300 candidates at once."""
    objective = Quadratic(n=n, d=40, seed=5)
    learned = TWA(constraint=constraint).learn(objective).coefficients
    plain = [Coefficients.uniform(range(n), n), *Coefficients.singles(n)]
    reached = -objective.score(learned).value
    assert reached < min(-objective.score(each).value for each in plain)
    assert 1 / sum(c * c for c in learned.values[0]) > 2 and learned not in plain


def test_the_best_scored_point_of_a_training_is_returned_and_not_the_last():
    """The rate is so large that the last point is worse than the mean."""
    objective = Quadratic(n=4, d=9, seed=1)
    learned = TWA(epochs=10, lr=2.0).learn(objective)
    best = min(map(objective.of_subset, [range(4), [0], [1], [2], [3]]))
    assert -objective.score(learned.coefficients).value <= best


def test_default_epochs_give_at_least_200_steps():
    for batches, epochs in ((1, 200), (3, 67), (20, 10), (500, 10)):
        assert default_epochs(batches) == epochs
    assert len(TWA().learn(Quadratic(n=3, d=2, seed=0)).trace["loss"]) == 201
