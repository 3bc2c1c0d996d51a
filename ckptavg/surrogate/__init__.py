"""A quadratic stand-in for the loss in the space of coefficients, on which every question is answered for nothing.

q(β) = F + gᵀΔ + ½ ΔᵀHΔ with Δ = β − β₀ around the mean of all candidates, β₀ = 1/N. Pure mathematics: what builds one
from a network is `ckptavg.mixture.Mixture.surrogate`.

Shape suffixes: N = candidates, M = mixtures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import Tensor

Curvature: TypeAlias = Literal["exact", "gauss-newton"]


@dataclass(frozen=True)
class Surrogate:
    """The loss around the mean of N candidates, to second order.

    Attributes:
        value: F, the loss at the mean.
        gradient_N: [N] float64 on the CPU, ∂F/∂β.
        hessian_NN: [N, N] float64 on the CPU, symmetric: the second derivatives, or their Gauss–Newton part, which is
            positive semidefinite where the loss is convex in the model's output.
        curvature: which of the two.
        note: why it is not the one that would have been taken first, or ``""``.
    """

    value: float
    gradient_N: Tensor
    hessian_NN: Tensor
    curvature: Curvature
    note: str = ""

    @property
    def n(self) -> int:
        """The number of candidates."""
        return len(self.gradient_N)

    def recentered(self, beta_N: Tensor, value: float, gradient_N: Tensor) -> Surrogate:
        """The one with the same second derivatives whose value and gradient at ``beta_N`` are these: closer around it.

        Args:
            beta_N: [N], coefficients that sum to one.
            value: the loss there.
            gradient_N: [N], its gradient there.
        """
        off_N = beta_N - 1 / self.n
        bend_N = self.hessian_NN @ off_N
        slope_N = gradient_N - bend_N
        return replace(self, value=value - float(off_N @ (slope_N + 0.5 * bend_N)), gradient_N=slope_N)

    def __call__(self, beta_MN: Tensor) -> Tensor:
        """[M], q of each row of [M, N] coefficients that sum to one; [] of one row [N]."""
        off_MN = beta_MN - 1 / self.n
        return self.value + off_MN @ self.gradient_N + 0.5 * ((off_MN @ self.hessian_NN) * off_MN).sum(dim=-1)
