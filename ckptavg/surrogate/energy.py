"""q at the uniform average of a subset as a quadratic function of zeros and ones, and the best subsets seen so far.

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

ROUNDING = 2.0**-48  # of the largest sum that an energy could be: differences below are a tie


@dataclass(frozen=True)
class Energy:
    """E(S) = Σ_{i∈S} l_i + Σ_{i,j∈S} H_ij of ``k`` candidates, those left out where that is fewer than those chosen.

    Attributes:
        linear_N: [N], l = ±2K·g, centred; K candidates are chosen.
        hessian_NN: [N, N], centred.
        k: the size of S.
        left_out: whether S is what is left out.
        rounding: energies that differ by less are equal.
    """

    linear_N: Tensor
    hessian_NN: Tensor
    k: int
    left_out: bool
    rounding: float

    @staticmethod
    def of(q: Surrogate, k: int) -> Energy:
        """The energy of the subsets of k candidates, q at their uniform average being F + E/2k²."""
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
        """[M], E of each row of [M, N]."""
        return x_MN @ self.linear_N + ((x_MN @ self.hessian_NN) * x_MN).sum(dim=-1)

    def candidates(self, chosen: Mask) -> Mask:
        """Who is averaged."""
        left_out = set(chosen)
        return tuple(i for i in range(self.n) if i not in left_out) if self.left_out else chosen


class Shortlist:
    """The ``count`` best of all masks that were seen."""

    def __init__(self, energy: Energy, count: int) -> None:
        self.energy, self.count = energy, count
        self.found: list[tuple[float, Mask]] = []

    @property
    def cut(self) -> float:
        """What has at least this energy is no better than what was found."""
        return self.found[-1][0] - self.energy.rounding if len(self.found) == self.count else math.inf

    def see(self, x_MN: Tensor) -> None:
        """Masks as rows of zeros and ones."""
        e_M = self.energy(x_MN)
        at_M = (e_M <= self._last(e_M) + self.energy.rounding).nonzero()[:, 0]
        self.add(e_M[at_M].tolist(), [tuple(row.nonzero()[:, 0].tolist()) for row in x_MN[at_M]])

    def least(self, e_M: Tensor) -> Tensor:
        """Where the ``count`` smallest energies are that are no worse than what was found; of ties the last ones."""
        last = self._last(e_M)
        tied_M = ((e_M >= last) & (e_M <= last + self.energy.rounding) & (e_M < math.inf)).nonzero()[-self.count :, 0]
        return torch.cat([(e_M < last).nonzero()[:, 0], tied_M])

    def _last(self, e_M: Tensor) -> float:
        """The largest of these energies that would be on the list."""
        last = float(e_M.kthvalue(min(self.count, len(e_M))).values) if len(e_M) else math.inf
        return min(last, self.found[-1][0]) if len(self.found) == self.count else last

    def add(self, energies: Iterable[float], masks: Iterable[Mask]) -> None:
        """Sort in; a run of energies within rounding of its first is a tie, and goes to the later candidates."""
        known = {mask for _, mask in self.found}
        new = {mask: energy for energy, mask in zip(energies, masks, strict=True) if mask not in known}
        if not new:
            return
        ties: list[tuple[float, Mask]] = []
        queue = sorted([*self.found, *((energy, mask) for mask, energy in new.items()), (math.inf, ())])
        self.found = []
        for at in queue:
            if ties and at[0] > ties[0][0] + self.energy.rounding:
                self.found += sorted(ties, key=lambda at: self.energy.candidates(at[1]), reverse=True)
                ties = []
                if len(self.found) >= self.count:
                    break
            ties.append(at)
        del self.found[self.count :]
