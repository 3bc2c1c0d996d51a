"""The best coefficients on the surrogate against scipy, dense KKT systems and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from ckptavg.strategies.solvers.subspace import Subspace
from ckptavg.surrogate import Surrogate
from ckptavg.surrogate.optimum import affine_optimum, simplex_optimum

EXACT = 1e-9  # float64 with condition numbers up to about 1e4, in problems of order 1
FAR = 1e6  # a radius that excludes no optimum of a bounded problem


def random_surrogate(n: int, seed: int, *, psd: bool = True, slope: float = 1.0, rank: int | None = None) -> Surrogate:
    draws = torch.Generator().manual_seed(seed)
    half = torch.randn(n, rank or 2 * n, generator=draws, dtype=torch.float64)
    square = torch.randn(n, n, generator=draws, dtype=torch.float64)
    hessian = half @ half.T / half.shape[1] if psd else (square + square.T) / 2
    return Surrogate(1.5, slope * torch.randn(n, generator=draws, dtype=torch.float64), hessian, "exact")


def moved(q: Surrogate) -> Surrogate:
    """Return the same function on Σβ = 1."""
    v_N = torch.linspace(-1, 2, q.n, dtype=torch.float64)
    return Surrogate(q.value, q.gradient_N + 5, q.hessian_NN + 30 + v_N + v_N[:, None], "exact")


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


def gap(q: Surrogate, beta_N: Tensor) -> float:
    slope_N = q.gradient_N + q.hessian_NN @ (beta_N - 1 / q.n)
    return float(slope_N @ beta_N - slope_N.min())


def coordinates(beta_N: Tensor, d_N: Tensor) -> Tensor:
    """Return the norm-minimal x of these coefficients: x_i = d_i·(β_i − 1/N + c) with the best c."""
    x_N = d_N * (beta_N - 1 / len(d_N))
    return x_N - d_N * (d_N @ x_N) / (d_N @ d_N)


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_the_affine_optimum_solves_the_kkt_system(n: int):
    q = random_surrogate(n, n)
    system, right = np.ones((n + 1, n + 1)), np.ones(n + 1)
    system[n, n], system[:n, :n] = 0, q.hessian_NN.numpy()
    right[:n] = q.hessian_NN.numpy() @ np.full(n, 1 / n) - q.gradient_N.numpy()
    expected = np.linalg.solve(system, right)[:n]
    for same in (q, moved(q)):
        assert affine_optimum(same, FAR, ones(n)).numpy() == pytest.approx(expected, abs=EXACT)
    assert float(affine_optimum(q, FAR, ones(n)).sum()) == pytest.approx(1, abs=1e-12)


def test_flat_directions_stay_at_zero_and_slopes_along_them_reach_the_boundary():
    q = random_surrogate(8, 0, rank=3)
    inside = Surrogate(0.0, q.hessian_NN @ torch.arange(8.0, dtype=torch.float64), q.hessian_NN, "exact")
    beta_N = affine_optimum(inside, FAR, ones(8))
    slope_N = inside.gradient_N + inside.hessian_NN @ (beta_N - 1 / 8)
    assert slope_N.numpy() == pytest.approx(float(slope_N.mean()), abs=EXACT)  # equal slopes: no exchange lowers q
    for unbounded in (q, random_surrogate(8, 0, psd=False)):
        assert float((affine_optimum(unbounded, 0.7, ones(8)) - 1 / 8).norm()) == pytest.approx(0.7, abs=EXACT)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), st.booleans(), st.sampled_from([0.05, 1.0, 20.0]), st.integers(0, 10**6))
def test_in_the_trust_region_the_optimality_conditions_hold(n: int, psd: bool, radius: float, seed: int):
    """Moré and Sorensen: (A + μ)x = −b, A + μ ⪰ 0, μ ≥ 0, μ(r − ‖x‖) = 0 are necessary and sufficient."""
    q = random_surrogate(n, seed, psd=psd)
    d_N = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    beta_N = affine_optimum(q, radius, d_N)
    x_N = coordinates(beta_N, d_N)
    assert Subspace(d_N, simplex=False).coefficients(x_N).numpy() == pytest.approx(beta_N.numpy(), abs=EXACT)
    to_beta_NN = (torch.eye(n, dtype=torch.float64) - 1 / n) @ (1 / d_N).diag()
    a_NN, b_N = to_beta_NN.T @ q.hessian_NN @ to_beta_NN, to_beta_NN.T @ q.gradient_N
    residual_N, length = a_NN @ x_N + b_N, float(x_N.norm())
    mu = -float(residual_N @ x_N) / length**2
    scale = 1 + float(a_NN.abs().max()) * radius
    assert length <= radius * (1 + 1e-12)
    assert (residual_N + mu * x_N).abs().max() <= EXACT * scale
    assert mu >= -EXACT * scale and abs(mu * (radius - length)) <= EXACT * scale
    off = torch.linalg.svd(d_N[None]).Vh[1:]  # x ∝ d changes nothing
    assert float(torch.linalg.eigvalsh(off @ a_NN @ off.T)[0]) + mu >= -EXACT * scale


@pytest.mark.parametrize("psd", [True, False])
def test_the_trust_region_agrees_with_scipy(psd: bool):
    q, d_N, radius = random_surrogate(6, 3, psd=psd), torch.linspace(0.5, 2, 6, dtype=torch.float64), 0.7
    d = d_N.numpy()

    def value(x: np.ndarray) -> float:
        return float(q(Subspace(d_N, simplex=False).coefficients(torch.tensor(x))))

    inside = {"type": "ineq", "fun": lambda x: radius**2 - x @ x}
    starts = np.random.default_rng(0).normal(size=(12, 6)) * 0.2
    best = min(
        (minimize(value, x, method="SLSQP", constraints=[inside], options={"ftol": 1e-14}) for x in starts),
        key=lambda end: end.fun,
    )
    # scipy's x may lie outside by its tolerance, and differentiates numerically: about 1e-8
    assert float(q(affine_optimum(q, radius, torch.tensor(d)))) == pytest.approx(best.fun, abs=1e-6)


@pytest.mark.parametrize("curvature", [-1.0, 0.0])
def test_the_hard_case_reaches_the_boundary_along_the_lowest_curvature(curvature: float):
    """In the plane's own axes λ = (c, 2, 3) and γ = (0, 1, 1): t = (±√(r² − ‖t'‖²), −1/(2 + μ), −1/(3 + μ))."""
    axes_NK = torch.linalg.svd(torch.ones(1, 4, dtype=torch.float64)).Vh[1:].T
    lambda_K = torch.tensor([curvature, 2.0, 3.0], dtype=torch.float64)
    gamma_K = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    q = Surrogate(0.0, axes_NK @ gamma_K, axes_NK * lambda_K @ axes_NK.T, "exact")
    beta_N = affine_optimum(q, 2.0, ones(4))
    t_K = axes_NK.T @ (beta_N - 0.25)
    mu = -min(curvature, 0)
    rest = (1 / (2 + mu)) ** 2 + (1 / (3 + mu)) ** 2
    expected = [math.sqrt(4 - rest) if curvature < 0 else 0, 1 / (2 + mu), 1 / (3 + mu)]
    assert t_K.abs().tolist() == pytest.approx(expected, abs=EXACT)
    assert t_K[1] < 0 and t_K[2] < 0
    if curvature < 0:
        assert t_K[0] * axes_NK[-1, 0] > 0  # of two equally good solutions, the one with the last candidate


def test_a_candidate_at_the_mean_has_no_coordinate():
    """With d = 0, x/d counts as 0 and the coefficient follows from the others."""
    q, d_N = random_surrogate(5, 1), torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    beta_N = affine_optimum(q, FAR, d_N)
    assert beta_N[2] == pytest.approx(float(beta_N[4]), abs=1e-14)
    moves = torch.eye(5, dtype=torch.float64)[[0, 1, 3]] - 1 / 5
    slope = moves @ (q.gradient_N + q.hessian_NN @ (beta_N - 1 / 5))
    assert slope.numpy() == pytest.approx(0, abs=EXACT)
    assert affine_optimum(q, 1.0, torch.zeros(5, dtype=torch.float64)).tolist() == [0.2] * 5


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 25), st.sampled_from([1, 3, None]), st.sampled_from([0.0, 0.01, 1.0, 100.0]), st.integers(0, 10**6)
)
def test_a_convex_surrogate_has_no_duality_gap_at_the_simplex_optimum(
    n: int, rank: int | None, slope: float, seed: int
):
    q = random_surrogate(n, seed, rank=rank, slope=slope)
    for same in (q, moved(q)):
        beta_N = simplex_optimum(same)
        assert bool((beta_N >= 0).all()) and float(beta_N.sum()) == pytest.approx(1, abs=1e-13)
        assert gap(q, beta_N) <= 1e-10  # an upper bound on q(β) − min q


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
    beta_N = simplex_optimum(q)
    assert float(q(beta_N)) == pytest.approx(end.fun, abs=1e-9)
    assert beta_N.numpy() == pytest.approx(end.x, abs=1e-4)
    assert ((beta_N == 0) == torch.tensor(end.x < 1e-6)).all()  # exactly 0


def test_an_ill_conditioned_simplex_optimum_is_found_to_the_last_digits():
    eigenvalues = torch.logspace(0, -9, 40, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    h_NN = axes * eigenvalues @ axes.T
    q = Surrogate(0.0, 0.01 * axes.sum(dim=1), (h_NN + h_NN.T) / 2, "gauss-newton")
    assert gap(q, simplex_optimum(q)) <= 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_with_indefinite_curvature_no_exchange_and_no_simple_start_is_better(seed: int):
    """With half or a few of the eigenvalues below zero, so that one or several coefficients are nonzero."""
    q = random_surrogate(7, seed, psd=seed % 2 == 0, slope=0.1)
    if seed % 2 == 0:
        q = Surrogate(q.value, q.gradient_N, q.hessian_NN - 0.4 * torch.eye(7, dtype=torch.float64), "exact")
    beta_N = simplex_optimum(q)
    assert seed % 2 or int((beta_N > 0).sum()) > 2
    value = float(q(beta_N))
    assert bool((beta_N >= 0).all()) and float(beta_N.sum()) == pytest.approx(1, abs=1e-13)
    single = q(torch.eye(7, dtype=torch.float64))
    assert value <= min(float(single.min()), q.value) + 1e-12
    for giver in range(7):
        for taker in range(7):
            for part in (1e-4, 0.1, 0.5, 1.0):
                near_N = beta_N.clone()
                near_N[giver] -= part * beta_N[giver]
                near_N[taker] += part * beta_N[giver]
                assert float(q(near_N)) >= value - 1e-12
