"""Minimise the surrogate over coefficients that sum to one: in a trust region, or on the simplex.

Shape suffixes: N = candidates, K = coordinates of the plane.
"""

import math

import torch
from torch import Tensor

from ckptavg.surrogate import Surrogate

FLAT = 1e-12  # fraction of the largest curvature that counts as zero
LEVEL = 1e-10  # fraction of the gradient's norm that counts as zero slope along a flat direction
GAP = 1e-13  # duality gap of the simplex optimum, as a fraction of the largest slope and curvature
EXCHANGES = 5000  # limit of the local search on the simplex
TINY = 1e-300


def affine_optimum(q: Surrogate, radius: float, metric_N: Tensor) -> Tensor:
    """Return the minimiser of q with Σβ = 1 and ‖x‖ ≤ radius in TWA's coordinates β = 1/N + y − mean(y), y_i = x_i/d_i.

    In orthonormal coordinates t of the x that affect β, in which H is diag λ and g is γ, the minimiser is
    t_i = −γ_i/(λ_i + μ): μ = 0 if that is a minimum inside the region, else the μ > 0, μ ≥ −λ_1 at which ‖t‖ is the
    radius, found by bisection to the last bit. In the hard case, γ_i = 0 for all λ_i = λ_1 and ‖t‖ too small even at
    μ = −λ_1, t is extended to the boundary along such an eigenvector, towards the later candidates. Along directions
    that are flat to rounding (λ_i ≤ 10⁻¹² of the largest, and γ_i ≤ 10⁻¹⁰ of ‖γ‖) t stays at 0.

    Args:
        radius: in units of x, > 0.
        metric_N: [N], d_i ≥ 0, the distances ‖w_i − w̄‖; where 0, x_i has no effect.
    Returns:
        [N], sums to 1 to rounding.
    References:
        Moré and Sorensen 1983, Computing a trust region step, SIAM J. Sci. Stat. Comput. 4. The coordinates: TWA
        (arXiv:2205.13104).
    """
    g_N, h_NN = _centred(q)
    chart_NK = _chart(metric_N)
    if chart_NK.shape[1] == 0:
        return torch.full_like(g_N, 1 / q.n)
    lambda_K, vectors_KK = torch.linalg.eigh(chart_NK.T @ h_NN @ chart_NK)
    axes_NK = chart_NK @ vectors_KK
    gamma_K = axes_NK.T @ g_N
    flat_K = lambda_K.abs() <= FLAT * lambda_K.abs().max()
    lambda_K = lambda_K.masked_fill(flat_K, 0)
    gamma_K = gamma_K.masked_fill(flat_K & (gamma_K.abs() <= LEVEL * gamma_K.norm()), 0)
    flat_K = lambda_K == 0
    t_K = -gamma_K / lambda_K.masked_fill(flat_K, 1)  # if q is bounded below, the minimiser nearest to 0
    if bool((lambda_K < 0).any() or (gamma_K[flat_K] != 0).any() or t_K.norm() > radius):
        t_K = _on_the_boundary(lambda_K, gamma_K, radius, axes_NK)
    step_N = axes_NK @ t_K
    return 1 / q.n + step_N - step_N.mean()


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


def _chart(metric_N: Tensor) -> Tensor:
    """Return [N, K], the map from orthonormal coordinates of x to β − 1/N, without x ∝ d, which does not change β."""
    n, moving_N = len(metric_N), metric_N > 0
    x_NK = torch.eye(n, dtype=metric_N.dtype)[:, moving_N]
    if bool(moving_N.all()):
        normal_N1 = (metric_N / metric_N.norm())[:, None]
        x_NK = torch.linalg.qr(torch.cat([normal_N1, x_NK], dim=1)).Q[:, 1:n]
    y_NK = x_NK / torch.where(moving_N, metric_N, torch.ones_like(metric_N))[:, None]
    return y_NK - y_NK.mean(dim=0)


def _on_the_boundary(lambda_K: Tensor, gamma_K: Tensor, radius: float, axes_NK: Tensor) -> Tensor:
    """Return t with ‖t‖ = radius and (λ + μ)t = −γ.

    The unknown is s = μ − max(0, −λ_1), λ_1 being the least eigenvalue, so that s = 0 has no rounding error.
    """
    above_K = lambda_K - lambda_K[0].clamp(max=0)
    above_K = above_K.masked_fill(above_K <= FLAT * lambda_K.abs().max(), 0)
    lowest_K = above_K == 0
    gamma_K = gamma_K.masked_fill(lowest_K & (gamma_K.abs() <= len(gamma_K) * 2**-52 * gamma_K.norm()), 0)
    if bool((gamma_K[lowest_K] == 0).all()):
        t_K = -gamma_K / above_K.masked_fill(lowest_K, 1)
        short = radius**2 - float(t_K.square().sum())
        if short >= 0:
            away_N = axes_NK[:, 0]
            last = away_N[away_N.abs() > 1e-9 * away_N.abs().max()][-1]
            t_K[0] = math.copysign(math.sqrt(short), float(last))
            return t_K
    low, high = 0.0, float(gamma_K.norm()) / radius
    while low < (middle := low + (high - low) / 2) < high:
        if float((gamma_K / (above_K + middle)).norm()) > radius:
            low = middle
        else:
            high = middle
    return -gamma_K / (above_K + high)


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
