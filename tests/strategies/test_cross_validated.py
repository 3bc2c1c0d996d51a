"""TWA on a quadratic with cross-validated shrinkage: what is fitted, what is held out, and where it stops."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from quadratic import Curved, Quadratic, Regression, loss_of, plain, rows_of
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.strategies.sewa import SeWA
from ckptavg.strategies.solvers import cross_validated
from ckptavg.strategies.twa import TWA
from ckptavg.surrogate.optimum import shrunk_optima


class OneBatch(Quadratic):
    """A single batch whose loss is one number."""

    def gradients(self, coefficients: Coefficients, on: Any = None, folds: int = 1) -> Any:
        return super().gradients(coefficients, on, 1)


@pytest.mark.parametrize("constraint", ["affine", "simplex"])
def test_recentering_comes_closer_to_the_optimum(constraint: Any, monkeypatch: pytest.MonkeyPatch):
    objective = Curved(n=6, d=16, seed=2, scale=2.0)
    trained = TWA(constraint=constraint, epochs=600, lr=0.1).learn(objective).coefficients
    losses: list[float] = []
    for moves in (1, cross_validated.MOVES):
        monkeypatch.setattr(cross_validated, "MOVES", moves)
        learned = TWA(solver="quadratic", constraint=constraint, ridge=0.0).learn(objective)
        losses.append(loss_of(objective, learned.coefficients) - loss_of(objective, trained))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("constraint", ["affine", "simplex"])
def test_without_shrinkage_the_optimum_of_a_quadratic_is_found(constraint: Any):
    objective = Quadratic(n=6, d=16, seed=1)
    solved = TWA(solver="quadratic", constraint=constraint, ridge=0.0).learn(objective).coefficients
    trained = TWA(constraint=constraint, epochs=600, lr=0.1).learn(objective).coefficients
    assert objective.score(solved).value >= objective.score(trained).value - 1e-6


def test_on_the_simplex_no_coefficient_is_negative():
    """Candidates that come nearer to the optimum: the affine answer goes on beyond the last."""
    objective = Quadratic(n=6, d=60, seed=0)
    objective.weights_ND = 0.1 * objective.weights_ND + torch.linspace(2, 1, 6, dtype=torch.float64)[:, None]
    rows = [TWA(solver="quadratic", constraint=kind).learn(objective) for kind in ("affine", "simplex")]
    assert min(rows[0].coefficients.values[0]) < 0 <= min(rows[1].coefficients.values[0])
    assert {row["constraint"] for row in rows_of(rows[1])} == {"simplex"}


def test_ridge_fixes_the_shrinkage_and_more_of_it_stays_nearer_to_the_mean():
    objective = Regression(n=6, examples=60, seed=0)
    distances: list[float] = []
    for ridge in (0.0, 0.3, 3.0, 1e6):
        learned = TWA(solver="quadratic", constraint="affine", ridge=ridge).learn(objective)
        assert {row["shrinkage"] for row in rows_of(learned)} == {ridge} and learned.held_out is None
        (expected_N,) = shrunk_optima(objective.surrogate(), [ridge])
        assert learned.coefficients.values[0] == pytest.approx(expected_N.tolist(), abs=1e-9)
        distances.append(float((expected_N - 1 / 6).norm()))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-5 < distances[-2]


def test_where_the_real_loss_rises_a_fit_is_not_used_and_half_the_way_with_more_shrinkage_is_tried():
    class Walled(Regression):
        """A wall at a distance from the mean that the quadratic does not know."""

        def loss(self, c_N: Tensor, *args: Any, **options: Any) -> Tensor:
            return super().loss(c_N, *args, **options) + self.wall(c_N)

        def gradients(self, coefficients: Coefficients, *args: Any) -> Any:
            examples_F, value_F, gradient_FN = super().gradients(coefficients, *args)
            return examples_F, value_F + self.wall(torch.tensor(coefficients.values[0])), gradient_FN

        def wall(self, c_N: Tensor) -> float:
            return 100.0 * (float((c_N - 1 / self.n).norm()) > self.limit)

    objective = Walled(n=8, examples=200, seed=0)
    objective.limit = math.inf
    free = TWA(solver="quadratic", constraint="affine").learn(objective).coefficients
    objective.limit = 0.5 * float((torch.tensor(free.values[0]) - 1 / 8).norm())
    learned = TWA(solver="quadratic", constraint="affine").learn(objective)
    rows = rows_of(learned)
    used = [row[""] is None for row in rows]
    assert used[0] is False and True in used
    first = used.index(True)
    assert [row["step"] for row in rows[: first + 1]] == [0.5**half for half in range(first + 1)]
    assert all(row["loss"] > row["quadratic"] + 50 for row in rows[:first])
    strengths = [row["shrinkage"] for row in rows[: first + 1]]
    assert strengths == sorted(set(strengths))  # with more shrinkage every time
    assert objective.wall(torch.tensor(learned.coefficients.values[0])) == 0
    assert loss_of(objective, learned.coefficients) < loss_of(objective, plain(objective)[-1])


def test_one_loss_in_all_is_not_cross_validated_and_the_report_says_so():
    learned = TWA(solver="quadratic").learn(OneBatch(n=5, d=20, seed=0))
    (used,) = re.findall(r"no cross-validation, because .*: --ridge (\S+) was used", " ".join(learned.notes))
    assert {row["shrinkage"] for row in rows_of(learned)} == {float(used)} and learned.held_out is None
    given = TWA(solver="quadratic", ridge=0.1).learn(OneBatch(n=5, d=20, seed=0))
    auto, fixed = (SeWA(solver="quadratic", k=k).learn(OneBatch(n=5, d=20, seed=0)) for k in ("auto", 2))
    said = ["no cross-validation" in " ".join(one.notes) for one in (given, auto, fixed)]
    assert said == [False, True, False]


def test_the_held_out_loss_is_above_the_fitted_loss_and_nearer_to_that_on_fresh_examples():
    """A fit of 8 candidates to 60 examples is optimistic by about 2·7/60, a quarter."""
    gaps: list[tuple[float, float]] = []
    for seed in range(20):
        objective = Regression(n=8, examples=60, seed=seed)
        learned = TWA(solver="quadratic", constraint="affine").learn(objective)
        fitted, fresh = loss_of(objective, learned.coefficients), objective.fresh(learned.coefficients)
        if learned.held_out is None:  # a plain average was better than the fit
            continue
        assert learned.held_out >= fitted
        gaps.append((fresh - fitted, fresh - learned.held_out))
    assert len(gaps) > 10
    optimism, error = (sum(column) / len(gaps) for column in zip(*gaps, strict=True))
    assert optimism > 0 and abs(error) < 0.6 * optimism


def test_of_many_examples_the_held_out_loss_is_that_of_fresh_ones():
    """Each of the 20 losses is a mean of 1000 squares around 5, with a standard deviation of 5·√(2/1000) = 0.22."""
    errors: list[float] = []
    for seed in range(20):
        objective = Regression(n=6, examples=1000, seed=seed)
        learned = TWA(solver="quadratic", constraint="affine").learn(objective)
        assert learned.held_out is not None
        errors.append(learned.held_out - objective.fresh(learned.coefficients))
    assert abs(sum(errors) / len(errors)) < 4 * 0.25 / math.sqrt(len(errors))  # 4 σ, with the fresh ones' own noise


def test_the_mean_is_returned_if_the_real_loss_rises():
    class Rising(Quadratic):
        def score(self, coefficients: Coefficients, on: Any = None) -> Any:
            off = sum((c - 1 / self.n) ** 2 for c in coefficients.values[0])
            score = super().score(coefficients, on)
            return type(score)(value=-off, loss=off, metric=None, examples=1)

    learned = TWA(solver="quadratic").learn(Rising(n=5, d=8, seed=0))
    assert learned.coefficients == Coefficients(((0.2,) * 5,))
