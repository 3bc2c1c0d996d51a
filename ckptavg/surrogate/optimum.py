"""Minimise the surrogate over coefficients that sum to one: with shrinkage towards the mean, or on the simplex.

Shape suffixes: N = candidates, S = strengths of the shrinkage, F = folds, M = gradients, R = M·S problems.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ckptavg.surrogate import Surrogate

STEPS = 500  # of the descent for many strengths at once
STEEP = 1e-9  # fraction of the largest curvature from which a direction is not flat
TINY = 1e-300


def shrunk_optima(q: Surrogate, strengths: Sequence[float], gradient_FN: Tensor | None = None) -> Tensor:
    """Return [S, N]: for each of S strengths λ ≥ 0 the minimiser of q(β) + λ·h/2·‖β − 1/N‖² with Σβ = 1.

    h is the mean size of the eigenvalues of H on Σ = 0: that of its diagonal if none is negative. In eigenvectors v_i
    of H, with eigenvalues l_i and slopes γ_i, it is β = 1/N − Σ_i γ_i/(l_i + λh)·v_i; negative l_i count as 0, and
    along directions that are flat to rounding (l_i + λh ≤ 10⁻⁹ of the largest l) β stays at 1/N.

    Args:
        gradient_FN: gradients at the mean that replace that of q; the result is then [F, S, N].
    """
    g_MN, h_NN, (l_N, vectors_NN) = _stacked(q, gradient_FN)
    bent_SN = l_N.clamp(min=0) + l_N.abs().mean() * torch.tensor(list(strengths), dtype=h_NN.dtype)[:, None]
    slope_M1N = (g_MN @ vectors_NN)[:, None]
    flat_SN = bent_SN <= STEEP * l_N.abs().max()
    step_MSN = (slope_M1N / bent_SN.clamp(min=TINY)).masked_fill(flat_SN, 0) @ vectors_NN.T
    beta_MSN = 1 / q.n - (step_MSN - step_MSN.mean(dim=-1, keepdim=True))
    beta_MSN = beta_MSN / beta_MSN.sum(dim=-1, keepdim=True)
    return beta_MSN[0] if gradient_FN is None else beta_MSN


def shrunk_simplex_optima(q: Surrogate, strengths: Sequence[float], gradient_FN: Tensor | None = None) -> Tensor:
    """Return `shrunk_optima` with β ≥ 0, by `STEPS` steps of accelerated projected gradient descent.

    All problems are solved at once, to a few digits of q.

    References:
        Beck and Teboulle 2009, A fast iterative shrinkage-thresholding algorithm, SIAM J. Imaging Sci. 2; restarts:
        O'Donoghue and Candès 2015, arXiv:1204.3982.
    """
    g_MN, h_NN, (l_N, _) = _stacked(q, gradient_FN)
    count = len(strengths)
    ridge_R1 = (l_N.abs().mean() * torch.tensor(list(strengths), dtype=h_NN.dtype)).repeat(len(g_MN))[:, None]
    g_RN = g_MN.repeat_interleave(count, dim=0)
    rate_R1 = 1 / (l_N.abs().max() + ridge_R1).clamp(min=TINY)
    beta_RN = ahead_RN = torch.full_like(g_RN, 1 / q.n)
    momentum_R1 = torch.ones_like(ridge_R1)
    for _ in range(STEPS):
        next_RN = _on_simplex(ahead_RN - rate_R1 * (g_RN + ahead_RN @ h_NN + ridge_R1 * ahead_RN))
        uphill_R1 = ((ahead_RN - next_RN) * (next_RN - beta_RN)).sum(dim=1, keepdim=True) > 0
        grown_R1 = (1 + (1 + 4 * momentum_R1.square()).sqrt()) / 2
        factor_R1 = ((momentum_R1 - 1) / grown_R1).masked_fill(uphill_R1, 0)
        momentum_R1 = grown_R1.masked_fill(uphill_R1, 1)
        ahead_RN, beta_RN = next_RN + factor_R1 * (next_RN - beta_RN), next_RN
    beta_MSN = (beta_RN / beta_RN.sum(dim=1, keepdim=True)).view(len(g_MN), count, q.n)
    return beta_MSN[0] if gradient_FN is None else beta_MSN


def _stacked(q: Surrogate, gradient_FN: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the centred gradients [M, N], of q or as given, the centred H, and its eigenvalues and eigenvectors."""
    g_N, h_NN = _centred(q)
    g_MN = g_N[None] if gradient_FN is None else gradient_FN - gradient_FN.mean(dim=1, keepdim=True)
    return g_MN, h_NN, tuple(torch.linalg.eigh(h_NN))


def _on_simplex(x_RN: Tensor) -> Tensor:
    """Return the point of β ≥ 0, Σβ = 1 that is nearest to each row."""
    sorted_RN = x_RN.sort(dim=1, descending=True).values
    above_RN = (sorted_RN.cumsum(dim=1) - 1) / torch.arange(1, x_RN.shape[1] + 1, dtype=x_RN.dtype)
    last_R1 = (sorted_RN > above_RN).sum(dim=1, keepdim=True) - 1
    return (x_RN - above_RN.gather(1, last_R1)).clamp(min=0)


def _centred(q: Surrogate) -> tuple[Tensor, Tensor]:
    """Return Pg and PHP, P = 1 − 11ᵀ/N: q is unchanged on Σβ = 1, and equals F + gᵀβ + ½ βᵀHβ there."""
    h_NN = q.hessian_NN - q.hessian_NN.mean(dim=0)
    h_NN = h_NN - h_NN.mean(dim=1, keepdim=True)
    return q.gradient_N - q.gradient_N.mean(), (h_NN + h_NN.T) / 2
