"""The best coefficients on the surrogate against scipy, dense KKT systems and closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic import random_surrogate
from scipy.optimize import minimize
from torch import Tensor

from ckptavg.surrogate import Surrogate
from ckptavg.surrogate.optimum import shrunk_optima, shrunk_simplex_optima

EXACT = 1e-9  # float64 with condition numbers up to about 1e4, in problems of order 1


def moved(q: Surrogate) -> Surrogate:
    """Return the same function on Σβ = 1."""
    v_N = torch.linspace(-1, 2, q.n, dtype=torch.float64)
    return Surrogate(q.value, q.gradient_N + 5, q.hessian_NN + 30 + v_N + v_N[:, None], "exact")


def gap(q: Surrogate, beta_N: Tensor) -> float:
    slope_N = q.gradient_N + q.hessian_NN @ (beta_N - 1 / q.n)
    return float(slope_N @ beta_N - slope_N.min())


def shrunk(q: Surrogate, strength: float) -> Surrogate:
    """Return q(β) + λ·h/2·‖β − 1/N‖², written out."""
    plane_NN = torch.eye(q.n, dtype=torch.float64) - 1 / q.n
    h = float((plane_NN @ q.hessian_NN @ plane_NN).diagonal().mean())
    return Surrogate(q.value, q.gradient_N, q.hessian_NN + strength * h * torch.eye(q.n, dtype=torch.float64), "exact")


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_a_shrunk_optimum_solves_the_kkt_system(n: int):
    q, strengths = random_surrogate(n, n), [0.0, 0.01, 1.0, 100.0]
    for same in (q, moved(q)):
        for strength, beta_N in zip(strengths, shrunk_optima(same, strengths), strict=True):
            system, right = np.ones((n + 1, n + 1)), np.ones(n + 1)
            system[n, n], system[:n, :n] = 0, shrunk(q, strength).hessian_NN.numpy()
            right[:n] = system[:n, :n] @ np.full(n, 1 / n) - q.gradient_N.numpy()
            assert beta_N.numpy() == pytest.approx(np.linalg.solve(system, right)[:n], abs=EXACT)
            assert float(beta_N.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("solve", [shrunk_optima, shrunk_simplex_optima])
def test_shrinkage_leads_from_the_optimum_to_the_mean(solve: Any):
    q = random_surrogate(8, 0, slope=0.1)
    beta_SN = solve(q, [0.0, 1e-9, 0.1, 1.0, 10.0, 1e9])
    distance_S = (beta_SN - 1 / 8).norm(dim=1)
    assert bool((distance_S.diff() <= 1e-9).all()) and float(distance_S[-1]) < 1e-7
    assert (beta_SN[0] - beta_SN[1]).abs().max() < 1e-6
    assert bool((q(beta_SN).diff() >= -1e-12).all()) and float(q(beta_SN[-1])) <= q.value + 1e-12


def test_without_shrinkage_flat_directions_stay_at_the_mean():
    q, plane_NN = random_surrogate(8, 0, rank=3), torch.eye(8, dtype=torch.float64) - 1 / 8
    for slope_N in (q.gradient_N, q.hessian_NN @ torch.arange(8.0, dtype=torch.float64)):
        flat = Surrogate(0.0, slope_N, q.hessian_NN, "exact")
        (beta_N,) = shrunk_optima(flat, [0.0])
        values, axes = torch.linalg.eigh(plane_NN @ q.hessian_NN @ plane_NN)
        off_N = axes.T @ (beta_N - 1 / 8)
        assert off_N[values < 1e-9].abs().max() < EXACT
        residual_N = axes.T @ (flat.gradient_N + flat.hessian_NN @ (beta_N - 1 / 8))
        assert residual_N[values > 1e-9].abs().max() < EXACT


def test_negative_curvature_counts_as_none_and_identical_candidates_stay_at_the_mean():
    axes_NK = torch.linalg.svd(torch.ones(1, 4, dtype=torch.float64)).Vh[1:].T
    gamma_K = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    q = Surrogate(0.0, axes_NK @ gamma_K, axes_NK * torch.tensor([-1.0, 2.0, 5.0]).double() @ axes_NK.T, "exact")
    t_SK = (shrunk_optima(q, [0.0, 2.0]) - 0.25) @ axes_NK
    h = (1 + 2 + 5) / 4  # the sizes of the eigenvalues over N
    assert t_SK[0].tolist() == pytest.approx([0, -1 / 2, -1 / 5], abs=EXACT)
    assert t_SK[1].tolist() == pytest.approx([-1 / (2 * h), -1 / (2 + 2 * h), -1 / (5 + 2 * h)], abs=EXACT)
    same = Surrogate(1.0, torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64), "exact")
    assert shrunk_optima(same, [0.0, 1.0]).tolist() == [[0.25] * 4] * 2


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.sampled_from([0.03, 0.3, 3.0]), st.integers(0, 10**6))
def test_shrunk_simplex_optima_match_the_best_of_all_supports(n: int, slope: float, seed: int):
    """On each support the KKT system is solved; the best feasible solution is the optimum."""
    q, strengths = random_surrogate(n, seed, slope=slope), [0.0, 0.1, 10.0]
    for strength, beta_N in zip(strengths, shrunk_simplex_optima(q, strengths), strict=True):
        objective, best = shrunk(q, strength), math.inf
        for support in itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(1, n + 1)):
            at, k = list(support), len(support)
            system, right = np.ones((k + 1, k + 1)), np.ones(k + 1)
            system[k, k], system[:k, :k] = 0, objective.hessian_NN[at][:, at].numpy()
            right[:k] = (objective.hessian_NN @ torch.full((n,), 1 / n).double() - objective.gradient_N)[at].numpy()
            point_N = torch.zeros(n, dtype=torch.float64)
            point_N[at] = torch.from_numpy(np.linalg.solve(system, right)[:k])
            if bool((point_N >= -1e-12).all()):
                best = min(best, float(objective(point_N)))
        assert bool((beta_N >= 0).all()) and float(beta_N.sum()) == pytest.approx(1, abs=1e-12)
        assert float(objective(beta_N)) == pytest.approx(best, abs=1e-7)  # "to a few digits"


@pytest.mark.parametrize("seed", range(4))
def test_the_simplex_optimum_agrees_with_scipy(seed: int):
    q = random_surrogate(9, seed, slope=0.3)
    sums_to_one = {"type": "eq", "fun": lambda x: x.sum() - 1}
    end = minimize(
        lambda x: float(q(torch.tensor(x))),
        np.full(9, 1 / 9),
        jac=lambda x: (q.gradient_N + q.hessian_NN @ (torch.tensor(x) - 1 / 9)).numpy(),
        method="SLSQP",
        bounds=[(0, 1)] * 9,
        constraints=[sums_to_one],
        options={"ftol": 1e-15, "maxiter": 500},
    )
    beta_N = shrunk_simplex_optima(q, [0.0])[0]
    assert float(q(beta_N)) == pytest.approx(end.fun, abs=1e-7)
    assert beta_N.numpy() == pytest.approx(end.x, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_with_indefinite_curvature_the_simplex_form_is_not_worse_than_the_mean(seed: int):
    q = random_surrogate(7, seed, psd=False, slope=0.1)
    beta_N = shrunk_simplex_optima(q, [0.0])[0]
    assert bool((beta_N >= 0).all()) and float(q(beta_N)) <= q.value


def test_several_gradients_are_solved_as_one_by_one():
    q = random_surrogate(6, 1, slope=0.3)
    slopes_FN = torch.stack([random_surrogate(6, seed, slope=0.3).gradient_N for seed in range(3)])
    for solve in (shrunk_optima, shrunk_simplex_optima):
        together = solve(q, [0.0, 0.1], slopes_FN)
        for slope_N, beta_SN in zip(slopes_FN, together, strict=True):
            alone = solve(Surrogate(q.value, slope_N, q.hessian_NN, "exact"), [0.0, 0.1])
            torch.testing.assert_close(beta_SN, alone, rtol=0, atol=1e-12)
