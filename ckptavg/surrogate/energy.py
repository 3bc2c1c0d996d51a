"""The surrogate at the uniform average of a subset as a quadratic in 0/1 variables, and the best subsets seen.

Shape suffixes: N = candidates, K = chosen, M = masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ckptavg.surrogate import Surrogate

Mask: TypeAlias = tuple[int, ...]

ROUNDING = 2.0**-48  # fraction of the largest possible energy below which differences are ties


@dataclass(frozen=True)
class Energy:
    """E(S) = Σ_{i∈S} l_i + Σ_{i,j∈S} H_ij of ``k`` candidates: the chosen or the left-out ones, whichever are fewer.

    Attributes:
        linear_N: [N], l = ±2K·g, centred; K candidates are chosen.
        hessian_NN: [N, N], centred.
        k: the size of S.
        left_out: whether S holds the candidates left out.
        rounding: energies that differ by less count as equal.
    """

    linear_N: Tensor
    hessian_NN: Tensor
    k: int
    left_out: bool
    rounding: float

    @staticmethod
    def of(q: Surrogate, k: int) -> Energy:
        """Return the energy of subsets of k candidates; q at their uniform average is F + E/2k²."""
        g_N, h_NN, left_out = q.gradient_N, q.hessian_NN, 2 * k > q.n
        size = q.n - k if left_out else k
        scale = size * 2 * k * float(g_N.abs().max()) + size * size * float(h_NN.abs().max())
        linear_N = (-2 * k if left_out else 2 * k) * (g_N - g_N.mean())
        mean_N = h_NN.mean(dim=0)
        return Energy(
            linear_N, h_NN - mean_N - mean_N[:, None] + mean_N.mean(), size, left_out, ROUNDING * scale + 1e-300
        )

    @property
    def n(self) -> int:
        """The number of candidates."""
        return len(self.linear_N)

    def __call__(self, x_MN: Tensor) -> Tensor:
        """Return [M], E of each row of [M, N]."""
        return x_MN @ self.linear_N + ((x_MN @ self.hessian_NN) * x_MN).sum(dim=-1)

    def candidates(self, chosen: Mask) -> Mask:
        """Return the averaged candidates of a mask."""
        left_out = set(chosen)
        return tuple(i for i in range(self.n) if i not in left_out) if self.left_out else chosen


class Shortlist:
    """The ``count`` best masks seen so far."""

    def __init__(self, energy: Energy, count: int) -> None:
        self.energy, self.count = energy, count
        self.found: list[tuple[float, Mask]] = []

    @property
    def cut(self) -> float:
        """Energy from which a mask is no better than the listed ones; infinite until the list is full."""
        return self.found[-1][0] - self.energy.rounding if len(self.found) == self.count else math.inf

    def see(self, x_MN: Tensor) -> None:
        """Record masks given as rows of zeros and ones."""
        e_M = self.energy(x_MN)
        at_M = (e_M <= self._last(e_M) + self.energy.rounding).nonzero()[:, 0]
        self.add(e_M[at_M].tolist(), [tuple(row.nonzero()[:, 0].tolist()) for row in x_MN[at_M]])

    def least(self, e_M: Tensor) -> Tensor:
        """Return the positions of the ``count`` smallest energies that would be listed; the last of ties."""
        last = self._last(e_M)
        tied_M = ((e_M >= last) & (e_M <= last + self.energy.rounding) & (e_M < math.inf)).nonzero()[-self.count :, 0]
        return torch.cat([(e_M < last).nonzero()[:, 0], tied_M])

    def _last(self, e_M: Tensor) -> float:
        """Return the largest of these energies that would be listed."""
        last = float(e_M.kthvalue(min(self.count, len(e_M))).values) if len(e_M) else math.inf
        return min(last, self.found[-1][0]) if len(self.found) == self.count else last

    def add(self, energies: Iterable[float], masks: Iterable[Mask]) -> None:
        """Insert masks; energies within rounding of the first of their run tie, and the later candidates win."""
        listed = {mask for _, mask in self.found}
        new = {mask: energy for energy, mask in zip(energies, masks, strict=True) if mask not in listed}
        if not new:
            return
        ties: list[tuple[float, Mask]] = []
        queue = sorted([*self.found, *((energy, mask) for mask, energy in new.items()), (math.inf, ())])
        self.found = []
        for entry in queue:
            if ties and entry[0] > ties[0][0] + self.energy.rounding:
                self.found += sorted(ties, key=lambda tie: self.energy.candidates(tie[1]), reverse=True)
                ties = []
                if len(self.found) >= self.count:
                    break
            ties.append(entry)
        del self.found[self.count :]
