"""SeWA against brute force, a literal copy of its update rule, and scipy's projection."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic import Quadratic
from scipy.optimize import minimize

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.strategies.sewa import SeWA
from ckptavg.strategies.solvers.concrete_mask import BLOCK, likeliest, project_capped_simplex, sampled_mixture


@pytest.mark.parametrize("seed", range(6))
def test_the_chosen_subset_is_among_the_best_one_percent_on_a_quadratic(seed: int):
    objective = Quadratic(n=10, d=6, seed=seed)
    chosen = SeWA(k=4).learn(objective).coefficients.selected
    ranked = sorted(itertools.combinations(range(10), 4), key=objective.of_subset)
    assert ranked.index(chosen) < 0.01 * len(ranked)


def test_coefficients_are_one_over_k_for_exactly_k_candidates():
    coefficients = SeWA(k=3, steps=5).learn(Quadratic(n=7, d=4, seed=0)).coefficients
    assert sorted(coefficients.values[0]) == [0, 0, 0, 0, 1 / 3, 1 / 3, 1 / 3]


def test_ties_go_to_the_later_checkpoint():
    flat = Quadratic(n=6, d=3, seed=0, scale=0.0)  # the loss is 0 everywhere: every s stays K/N
    assert SeWA(k=2, steps=3).learn(flat).coefficients.selected == (4, 5)


@pytest.mark.parametrize("straight_through", [False, True])
def test_one_step_is_the_literal_update(straight_through: bool):
    """s ← Π_C(s − η ĝ), ĝ of mean 0 and of mean square 1, g by hand from the formula of the binary Concrete sample."""
    objective = Quadratic(n=5, d=4, seed=3)
    strategy = SeWA(k=2, steps=1, samples=3, tau_start=0.7, lr=0.2, straight_through=straight_through)
    learned = strategy.learn(objective)
    s = torch.full((5,), 0.4, dtype=torch.float64)
    uniform = torch.rand(BLOCK, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[0]
    gradient = torch.zeros(5, dtype=torch.float64)
    for u in uniform:
        noise = u.log() - (1 - u).log()  # −log(−log u') differences are logistic
        soft = 1 / (1 + torch.exp(-(torch.log(s / (1 - s)) + noise) / 0.7))
        m = (soft > 0.5).double() if straight_through and (soft > 0.5).any() else soft
        c = m / m.sum()
        by_c = 2 / objective.d * objective.weights_ND @ (c @ objective.weights_ND)
        by_m = (by_c - (by_c * c).sum()) / m.sum()
        by_s = soft * (1 - soft) / 0.7 / (s * (1 - s))
        gradient += by_m * by_s / 3
    gradient -= gradient.mean()
    moved = s - 0.2 * gradient / gradient.square().mean().sqrt()
    low, high = -1.0, 1.0
    for _ in range(200):  # ν by bisection, as in methods.md
        nu = (low + high) / 2
        low, high = (nu, high) if (moved - nu).clamp(0, 1).sum() > 2 else (low, nu)
    expected = (moved - max(0.0, high)).clamp(0, 1)
    torch.testing.assert_close(torch.tensor(learned.columns["s"], dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)


def test_a_probability_at_the_edge_can_come_back():
    """With the gradient of a plain clamp, which is 0 there, a dropped candidate could never return."""
    s = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    mixture = sampled_mixture(s, torch.zeros(3, dtype=torch.float64), 1.0, straight_through=False)
    (gradient,) = torch.autograd.grad(mixture[0], s)
    assert gradient[0] > 0 and gradient[1] < 0


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(-3, 3, allow_nan=False), min_size=1, max_size=12),
    st.floats(0.01, 12),
)
def test_projection_is_feasible_and_satisfies_the_optimality_conditions(values: list[float], k: float):
    s = torch.tensor(values, dtype=torch.float64)
    projected = project_capped_simplex(s, k)
    slack = 1e-9  # float64 sums of at most 12 terms below 3
    assert projected.min() >= 0 and projected.max() <= 1 and float(projected.sum()) <= k + slack
    clamped = s.clamp(0, 1)
    if float(clamped.sum()) <= k:
        assert torch.equal(projected, clamped)
        return
    assert math.isclose(float(projected.sum()), k, abs_tol=slack)
    inside = (projected > 1e-9) & (projected < 1 - 1e-9)
    shift = (s - projected)[inside]  # one multiplier ν for all strictly interior values
    assert len(shift) == 0 or float(shift.max() - shift.min()) < slack


def test_projection_agrees_with_scipy():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        s = torch.randn(6, generator=generator, dtype=torch.float64) * 2
        projected = project_capped_simplex(s, 2.0)
        target = s.tolist()
        solved = minimize(
            lambda x, target=target: sum((a - b) ** 2 for a, b in zip(x, target, strict=True)),
            x0=[1 / 3] * 6,
            bounds=[(0, 1)] * 6,
            constraints={"type": "ineq", "fun": lambda x: 2.0 - sum(x)},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        torch.testing.assert_close(projected, torch.tensor(solved.x.tolist(), dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"k": 0}, "--k must be at least 1"),
        ({"steps": 0}, "--steps"),
        ({"samples": 0}, "--samples"),
        ({"lr": 0.0}, "--lr"),
        ({"tau_end": -1.0}, "--tau-end"),
        ({"tau_start": float("nan")}, "--tau-start"),
    ],
)
def test_invalid_settings_are_refused(settings_: dict[str, float], message: str):
    with pytest.raises(UsageError, match=message):
        SeWA(**settings_)  # pyright: ignore[reportArgumentType]


def test_fewer_candidates_than_k_is_refused():
    with pytest.raises(UsageError, match="--k 5 asks for more checkpoints than the 3 candidates"):
        SeWA(k=5).check(3, ("val",), bounded=False)


@pytest.mark.parametrize("seed", range(5))
def test_the_most_probable_masks_are_ordered(seed: int):
    s_N = torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s_N[:2] = s_N[2]  # ties
    logit_N = torch.logit(s_N)
    found = likeliest(s_N, 3, 20)
    sums = sorted((float(logit_N[list(mask)].sum()) for mask in itertools.combinations(range(8), 3)), reverse=True)
    assert len(set(found)) == 20
    assert [float(logit_N[list(mask)].sum()) for mask in found] == pytest.approx(sums[:20])
    assert sorted(likeliest(s_N, 3, 99)) == sorted(itertools.combinations(range(8), 3))
    assert likeliest(torch.full((4,), 0.5), 2, 1) == [(2, 3)]


def test_the_most_probable_mask_with_the_lowest_real_loss_is_chosen():
    objective = Quadratic(n=8, d=6, seed=2)
    found = [SeWA(k=3, steps=2, verify=verify).learn(objective).coefficients for verify in (1, 56)]
    best = min(itertools.combinations(range(8), 3), key=objective.of_subset)
    assert found[0].selected != best == found[1].selected


def test_default_steps_grow_with_the_candidates():
    for n, steps in ((50, 100), (200, 200)):
        assert len(SeWA(verify=1).learn(Quadratic(n=n, d=4, seed=0)).trace["loss"]) == steps


@pytest.mark.parametrize("n", [60, 200])
def test_no_swap_improves_the_answer_after_few_gradient_steps(n: int):
    objective = Quadratic(n=n, d=30, seed=n)
    answers = [SeWA(k=4, steps=3, swaps=swaps).learn(objective).coefficients.selected for swaps in (0, 200)]
    best = objective.of_subset(answers[1])
    others = [j for j in range(n) if j not in answers[1]]
    swapped = [objective.of_subset([*(set(answers[1]) - {i}), j]) for i in answers[1] for j in others]
    assert min(swapped) >= best and objective.of_subset(answers[0]) > best


def test_a_plain_average_that_is_better_than_every_subset_is_the_answer_and_is_said():
    objective = Quadratic(n=8, d=6, seed=0)
    objective.weights_ND[3] = 0.0  # the optimum itself, alone
    learned = SeWA(k=3).learn(objective)
    assert learned.coefficients == Coefficients.uniform([3], 8)
    (note,) = learned.notes
    assert note.startswith("asked for the mean of 3, but the answer is a single candidate: loss 0.0000")
    opposite = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    objective = Quadratic(n=4, d=1, seed=0)
    objective.weights_ND = opposite
    (note,) = SeWA(k=3).learn(objective).notes
    assert "the answer is the mean of all 4 candidates" in note


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_never_above_a_plain_average(seed: int):
    objective = Quadratic(n=9, d=3, seed=seed)
    answer = -objective.score(SeWA(k=3, steps=1).learn(objective).coefficients).value
    assert answer <= min(map(objective.of_subset, [range(9), [6, 7, 8], *([i] for i in range(9))]))


def test_verify_1_is_the_papers_search_and_scores_nothing(monkeypatch: pytest.MonkeyPatch):
    objective = Quadratic(n=9, d=3, seed=0)
    monkeypatch.setattr(objective, "score", None)
    assert len(SeWA(k=3, verify=1).learn(objective).coefficients.selected) == 3
