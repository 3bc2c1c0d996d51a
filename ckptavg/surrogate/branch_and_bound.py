"""Branch and bound over subsets: an exhaustive search that can prove that the best subsets found are optimal.

Shape suffixes: N = candidates, K = dimensions of the plane Σx = 0, M = nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptavg.runtime import signals
from ckptavg.surrogate.energy import Energy, Shortlist

BATCH = 512  # nodes bounded at once
TINY = 1e-300
STEPS = 10  # of the relaxation at each node, started at the parent's solution


@dataclass(frozen=True)
class Relaxation:
    """Convex relaxation f(x) = lᵀx + xᵀQx over 0 ≤ x ≤ 1, Σx = k, equal to E if every x is 0 or 1."""

    linear_N: Tensor
    q_NN: Tensor
    k: int
    step: float

    @staticmethod
    def of(energy: Energy, shift_N: Tensor) -> Relaxation:
        """Move the `convexifier` d from the diagonal to the linear term, as x² = x at 0 and 1."""
        q_NN = energy.hessian_NN - shift_N.diag()
        linear_N = energy.linear_N + shift_N
        largest = max(float(torch.linalg.matrix_norm(q_NN, 2)), float(linear_N.abs().max()), TINY)
        return Relaxation(linear_N, q_NN, energy.k, 0.5 / largest)

    def minimum(self) -> Tensor:
        """Return [N], an approximate minimiser of f."""
        free_1N = torch.zeros_like(self.linear_N)[None]
        return self.descend(free_1N, free_1N + self.k / free_1N.shape[1], 150)[0]

    def descend(self, state_MN: Tensor, z_MN: Tensor, steps: int) -> Tensor:
        """Run accelerated projected gradient from z; ``state`` is 1 for a candidate in, −1 for out, 0 for free."""
        low_MN, high_MN = (state_MN > 0).to(z_MN), (state_MN >= 0).to(z_MN)
        z_MN = last_MN = self._project(z_MN, low_MN, high_MN)
        for step in range(steps):
            ahead_MN = z_MN + step / (step + 3) * (z_MN - last_MN)
            last_MN = z_MN
            z_MN = ahead_MN - self.step * (self.linear_N + 2 * ahead_MN @ self.q_NN)
            z_MN = self._project(z_MN, low_MN, high_MN)
        return z_MN

    def _project(self, z_MN: Tensor, low_MN: Tensor, high_MN: Tensor) -> Tensor:
        """Project approximately onto 0 ≤ z ≤ 1, Σz = k, by Newton's method on the multiplier of the sum."""
        shift_M1 = z_MN.new_zeros(len(z_MN), 1)
        for _ in range(5):
            x_MN = torch.clamp(z_MN - shift_M1, low_MN, high_MN)
            inner_M1 = ((x_MN > low_MN) & (x_MN < high_MN)).sum(dim=1, keepdim=True).clamp(min=1)
            shift_M1 = shift_M1 + (x_MN.sum(dim=1, keepdim=True) - self.k) / inner_M1
        return torch.clamp(z_MN - shift_M1, low_MN, high_MN)

    def tangent(self, z_MN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tangent at z, [M] a and [M, N] γ with f(x) ≥ a + γᵀx if Σx = k; z need not be feasible."""
        z_MN = z_MN + (self.k - z_MN.sum(dim=1, keepdim=True)) / z_MN.shape[1]  # f is convex on the plane only
        pull_MN = z_MN @ self.q_NN
        return -(pull_MN * z_MN).sum(dim=1), self.linear_N + 2 * pull_MN


def convexifier(h_NN: Tensor) -> Tensor:
    """Return [N], approximately the d with the largest Σ d such that H − diag d is positive semidefinite on Σx = 0.

    Σd + μ·log det of H − diag d in that plane is maximised for falling μ by Newton's method, whose damped steps never
    leave the domain of a self-concordant function. The result is lowered until H − diag d is semidefinite.

    References:
        Nesterov and Nemirovskii 1994, Interior-Point Polynomial Algorithms in Convex Programming.
    """
    n = len(h_NN)
    eye_NN = torch.eye(n, dtype=h_NN.dtype)
    basis_NK = torch.linalg.qr(eye_NN - 1 / n).Q[:, : n - 1]
    eigenvalues = torch.linalg.eigvalsh(basis_NK.T @ h_NN @ basis_NK)
    scale = float(eigenvalues.abs().max())
    if scale < TINY:
        return torch.full_like(h_NN[0], -scale)
    plane_KK = basis_NK.T @ (h_NN / scale) @ basis_NK
    least_N = (eigenvalues[0] / scale).expand(n)
    d_N = least_N - 0.1
    for power in range(6):
        mu = 0.1 * 0.2**power
        for _ in range(12):
            inverse_KK = torch.linalg.inv_ex(plane_KK - basis_NK.T * d_N @ basis_NK).inverse
            inverse_NN = basis_NK @ inverse_KK @ basis_NK.T
            slope_N, curvature_NN = 1 / mu - inverse_NN.diagonal(), inverse_NN.square()
            ridge = 1e-9 * curvature_NN.diagonal().mean()
            newton_N = torch.linalg.solve_ex(curvature_NN + ridge * eye_NN, slope_N).result
            d_N = d_N + newton_N / (1 + (slope_N @ newton_N).clamp(min=0).sqrt())
    if not bool(torch.isfinite(d_N).all()):
        d_N = least_N
    below = torch.linalg.eigvalsh(plane_KK - basis_NK.T * d_N @ basis_NK)[0].clamp(max=0)
    return scale * (d_N + below - 1e-14 * (1 + d_N.abs().max()))


def prove(relaxation: Relaxation, relaxed_N: Tensor, shortlist: Shortlist, limit: int) -> int:
    """Search depth first over candidates in or out; return the number of nodes, above the limit if it gave up.

    Otherwise every subset was seen or belongs to a node whose bound is no better than the shortlist, to rounding.

    A node's bound is the minimum over its subsets of a tangent of the relaxation, a sum of its smallest slopes. If the
    bound plus the cost of moving one candidate in or out reaches the cut, that candidate is fixed.
    """
    root_1N = torch.zeros_like(relaxed_N, dtype=torch.int8)[None]
    stack = [(root_1N, relaxed_N[None], torch.full_like(relaxed_N[:1], -math.inf))]
    nodes = 0
    while stack:
        signals.check()
        state_MN, z_MN, bound_M = stack.pop()
        while stack and len(state_MN) < BATCH:
            state_MN, z_MN, bound_M = map(torch.cat, zip((state_MN, z_MN, bound_M), stack.pop(), strict=True))
        alive_M = bound_M < shortlist.cut
        state_MN, z_MN = state_MN[alive_M], z_MN[alive_M]
        nodes += len(state_MN)
        if nodes > limit:
            break
        if not len(state_MN):
            continue
        z_MN = relaxation.descend(state_MN, z_MN, STEPS)
        state_MN, bound_M = fix(relaxation, shortlist, state_MN, z_MN)
        open_M = _undecided(shortlist, state_MN, bound_M)
        at_M1 = (z_MN - 0.5).abs().masked_fill(state_MN != 0, math.inf).argmin(dim=1, keepdim=True)
        for side in (-1, 1):
            child_MN = state_MN.scatter(1, at_M1, side)
            left_M = open_M[_undecided(shortlist, child_MN[open_M], bound_M[open_M])]
            stack.append((child_MN[left_M], z_MN[left_M], bound_M[left_M]))
    return nodes


def fix(relaxation: Relaxation, shortlist: Shortlist, state_MN: Tensor, z_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Bound the nodes, record the subset at each bound, and fix candidates whose other side exceeds the cut."""
    constant_M, slope_MN = relaxation.tangent(z_MN)
    rest_M1 = relaxation.k - (state_MN > 0).sum(dim=1, keepdim=True)
    ordered, place = slope_MN.masked_fill(state_MN != 0, math.inf).sort(dim=1)
    x_MN = (place.argsort(dim=1) < rest_M1).to(z_MN) + (state_MN > 0)
    shortlist.see(x_MN)
    bound_M1 = (constant_M + (slope_MN * x_MN).sum(dim=1))[:, None]
    worst_M1, next_M1 = ordered.gather(1, rest_M1 - 1), ordered.gather(1, rest_M1)
    moved_MN = bound_M1 + torch.where(x_MN > 0, next_M1 - slope_MN, slope_MN - worst_M1)
    fixed_MN = (moved_MN >= shortlist.cut) & (state_MN == 0)
    return torch.where(fixed_MN, (2 * x_MN - 1).to(state_MN), state_MN), bound_M1[:, 0]


def _undecided(shortlist: Shortlist, state_MN: Tensor, bound_M: Tensor) -> Tensor:
    """Return the nodes below the cut with more than one subset; record the subset of nodes with one."""
    rest_M = shortlist.energy.k - (state_MN > 0).sum(dim=1)
    free_M = (state_MN == 0).sum(dim=1)
    live_M = (bound_M < shortlist.cut) & (rest_M >= 0) & (rest_M <= free_M)
    all_M1 = (rest_M == free_M)[:, None]
    single_M = live_M & ((rest_M == 0) | all_M1[:, 0])
    shortlist.see(((state_MN > 0) | ((state_MN == 0) & all_M1))[single_M].to(bound_M))
    return (live_M & ~single_M).nonzero()[:, 0]
