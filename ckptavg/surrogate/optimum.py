"""Minimise the surrogate over coefficients that sum to one: with shrinkage towards the mean, or on the simplex.

Shape suffixes: N = candidates, S = strengths of the shrinkage, F = folds, M = gradients, R = M·S problems.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ckptavg.surrogate import Surrogate

FLAT = 1e-12  # fraction of the largest curvature that counts as zero
STEPS = 500  # of the descent for many strengths at once
STEEP = 1e-9  # fraction of the largest curvature from which a direction is not flat
GAP = 1e-13  # duality gap of the simplex optimum, as a fraction of the largest slope and curvature
EXCHANGES = 5000  # limit of the local search on the simplex
TINY = 1e-300


def shrunk_optima(q: Surrogate, strengths: Sequence[float], gradient_FN: Tensor | None = None) -> Tensor:
    """Return [S, N]: for each of S strengths λ ≥ 0 the minimiser of q(β) + λ·h/2·‖β − 1/N‖² with Σβ = 1.

    h is the mean of the diagonal of H on Σ = 0. In eigenvectors of H, with eigenvalues l_i and slopes γ_i, it is
    β = 1/N − Σ_i γ_i/(l_i + λh)·v_i; negative l_i count as 0, and along directions that are flat to rounding
    (l_i + λh ≤ 10⁻⁹ of the largest l) β stays at 1/N.

    Args:
        gradient_FN: gradients at the mean that replace that of q; the result is then [F, S, N].
    """
    g_MN, h_NN, size = _stacked(q, gradient_FN)
    l_N, vectors_NN = torch.linalg.eigh(h_NN)
    bent_SN = l_N.clamp(min=0) + size * torch.tensor(list(strengths), dtype=h_NN.dtype)[:, None]
    slope_M1N = (g_MN @ vectors_NN)[:, None]
    flat_SN = bent_SN <= STEEP * l_N.abs().max()
    step_MSN = (slope_M1N / bent_SN.clamp(min=TINY)).masked_fill(flat_SN, 0) @ vectors_NN.T
    beta_MSN = 1 / q.n - (step_MSN - step_MSN.mean(dim=-1, keepdim=True))
    beta_MSN = beta_MSN / beta_MSN.sum(dim=-1, keepdim=True)
    return beta_MSN[0] if gradient_FN is None else beta_MSN


def shrunk_simplex_optima(q: Surrogate, strengths: Sequence[float], gradient_FN: Tensor | None = None) -> Tensor:
    """Return `shrunk_optima` with β ≥ 0, by `STEPS` steps of accelerated projected gradient descent.

    Near the optimum to a few digits, for many strengths at once; `simplex_optimum` finds one to rounding.

    References:
        Beck and Teboulle 2009, A fast iterative shrinkage-thresholding algorithm, SIAM J. Imaging Sci. 2; restarts:
        O'Donoghue and Candès 2015, arXiv:1204.3982.
    """
    g_MN, h_NN, size = _stacked(q, gradient_FN)
    count = len(strengths)
    ridge_R1 = (size * torch.tensor(list(strengths), dtype=h_NN.dtype)).repeat(len(g_MN))[:, None]
    g_RN = g_MN.repeat_interleave(count, dim=0)
    rate_R1 = 1 / (torch.linalg.eigvalsh(h_NN).abs().max() + ridge_R1).clamp(min=TINY)
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


def _stacked(q: Surrogate, gradient_FN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centred gradients [M, N], of q or as given, the centred H, and the mean of its diagonal."""
    g_N, h_NN = _centred(q)
    g_MN = g_N[None] if gradient_FN is None else gradient_FN - gradient_FN.mean(dim=1, keepdim=True)
    return g_MN, h_NN, h_NN.diagonal().mean()


def _on_simplex(x_RN: Tensor) -> Tensor:
    """Return the point of β ≥ 0, Σβ = 1 that is nearest to each row."""
    sorted_RN = x_RN.sort(dim=1, descending=True).values
    above_RN = (sorted_RN.cumsum(dim=1) - 1) / torch.arange(1, x_RN.shape[1] + 1, dtype=x_RN.dtype)
    last_R1 = (sorted_RN > above_RN).sum(dim=1, keepdim=True) - 1
    return (x_RN - above_RN.gather(1, last_R1)).clamp(min=0)


def simplex_optimum(q: Surrogate) -> Tensor:
    """Return the minimiser of q with β ≥ 0 and Σβ = 1.

    If H is positive semidefinite on the plane, a primal-dual interior point method runs until the duality gap
    ∇q·β − min_i ∇q_i ≥ q(β) − min q is at most 10⁻¹³ of the largest slope and curvature, or no longer falls (then
    below 10⁻¹⁰ in q, unless q itself is that large); zero coefficients are then set to exactly 0. Otherwise the result
    is a local optimum: the best point reached by optimal exchanges between two coefficients from three starts: the
    optimum without H's negative eigenvalues, the mean, and the best single candidate. No exchange lowers it further.

    Returns:
        [N], ≥ 0, sums to 1 to rounding.
    References:
        Wright 1997, Primal-Dual Interior-Point Methods, SIAM, chapter 10. The exchanges: Platt 1998, SMO.
    """
    g_N, h_NN = _centred(q)
    lambda_N, vectors_NN = torch.linalg.eigh(h_NN)
    if float(lambda_N[0]) >= -FLAT * float(lambda_N.abs().max()):
        return _interior_point(g_N, h_NN)
    convex_NN = (vectors_NN * lambda_N.clamp(min=0)) @ vectors_NN.T
    single_N = torch.zeros_like(g_N)
    single_N[(g_N + h_NN.diagonal() / 2).argmin()] = 1
    starts = [_interior_point(g_N, convex_NN), torch.full_like(g_N, 1 / q.n), single_N]
    ends = [_exchange(g_N, h_NN, beta_N) for beta_N in starts]
    return min(ends, key=lambda beta_N: float(g_N @ beta_N + beta_N @ h_NN @ beta_N / 2))


def _centred(q: Surrogate) -> tuple[Tensor, Tensor]:
    """Return Pg and PHP, P = 1 − 11ᵀ/N: q is unchanged on Σβ = 1, and equals F + gᵀβ + ½ βᵀHβ there."""
    h_NN = q.hessian_NN - q.hessian_NN.mean(dim=0)
    h_NN = h_NN - h_NN.mean(dim=1, keepdim=True)
    return q.gradient_N - q.gradient_N.mean(), (h_NN + h_NN.T) / 2


def _interior_point(g_N: Tensor, h_NN: Tensor) -> Tensor:
    """Run Newton's method on z = Hβ + g − y ≥ 0, β ≥ 0, β_i z_i = a tenth of its mean; return the best β."""
    n, scale = len(g_N), max(float(g_N.abs().max()), float(h_NN.abs().max()), TINY)
    g_N, h_NN = g_N / scale, h_NN / scale

    def gap_at(beta_N: Tensor) -> float:  # an upper bound on q(β) − min q
        slope_N = g_N + h_NN @ beta_N
        return float(beta_N @ (slope_N - slope_N.min()))

    beta_N = best_N = torch.full_like(g_N, 1 / n)
    slope_N = g_N + h_NN @ beta_N
    z_N, y, gap = slope_N - slope_N.min() + 1, float(slope_N.min()) - 1, gap_at(beta_N)
    for _ in range(100):
        if gap <= GAP:
            break
        target = 0.1 * float(beta_N @ z_N) / n
        # dz = (target − βz − z·dβ)/β and H·dβ − dy − dz = y + z − slope, Σdβ = 1 − Σβ
        system_NN = h_NN + (z_N / beta_N).diag()
        right_N = y - (g_N + h_NN @ beta_N) + target / beta_N
        both_N2 = torch.linalg.solve_ex(system_NN, torch.stack([right_N, torch.ones_like(g_N)], dim=1)).result
        dy = (1 - beta_N.sum() - both_N2[:, 0].sum()) / both_N2[:, 1].sum()
        dbeta_N = both_N2[:, 0] + dy * both_N2[:, 1]
        dz_N = (target - beta_N * z_N - z_N * dbeta_N) / beta_N
        length = min(1.0, 0.99 * float(1 / torch.cat([-dbeta_N / beta_N, -dz_N / z_N]).clamp(min=TINY).max()))
        beta_N, z_N, y = beta_N + length * dbeta_N, z_N + length * dz_N, y + length * float(dy)
        if not bool(torch.isfinite(beta_N).all() and (beta_N > 0).all() and (z_N > 0).all()):
            break
        support_N = beta_N >= z_N.clamp(max=float(beta_N.max()))
        for point_N in (beta_N / beta_N.sum(), _on_support(g_N, h_NN, support_N)):
            if bool((point_N >= 0).all()) and (point_gap := gap_at(point_N)) < gap:
                best_N, gap = point_N, point_gap
    return best_N


def _on_support(g_N: Tensor, h_NN: Tensor, support_N: Tensor) -> Tensor:
    """Return the stationary point with this support, the one of least norm if there are several."""
    k = int(support_N.sum())
    system = h_NN.new_zeros(k + 1, k + 1)
    system[:k, :k] = h_NN[support_N][:, support_N]
    system[k, :k] = system[:k, k] = 1
    right = torch.cat([-g_N[support_N], g_N.new_ones(1)])
    solution = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:k, 0]
    point_N = torch.zeros_like(g_N)
    point_N[support_N] = solution / solution.sum()
    return point_N


def _exchange(g_N: Tensor, h_NN: Tensor, beta_N: Tensor) -> Tensor:
    """Repeat the exchange between two coefficients that lowers q most, until the gain is negligible."""
    beta_N, scale = beta_N.clone(), max(float(g_N.abs().max()), float(h_NN.abs().max()), TINY)
    diagonal_N = h_NN.diagonal()
    curve_NN = diagonal_N[:, None] + diagonal_N - 2 * h_NN
    for _ in range(EXCHANGES):
        slope_N = g_N + h_NN @ beta_N
        fall_NN = slope_N[:, None] - slope_N
        most_NN = beta_N[:, None].expand_as(h_NN)
        inner_NN = torch.where(curve_NN > 0, fall_NN / curve_NN.clamp(min=TINY), math.inf)
        amount_NN = torch.where((fall_NN > 0) | (curve_NN < 0), torch.minimum(inner_NN.clamp(min=0), most_NN), 0)
        gain_NN = amount_NN * fall_NN - amount_NN.square() * curve_NN / 2
        at = int(gain_NN.argmax())
        giver, taker = divmod(at, len(g_N))
        if float(gain_NN[giver, taker]) <= GAP * scale:
            break
        amount = float(amount_NN[giver, taker])
        beta_N[giver], beta_N[taker] = beta_N[giver] - amount, beta_N[taker] + amount
    return beta_N / beta_N.sum()
