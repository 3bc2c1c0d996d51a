"""A quadratic model of the loss in the space of coefficients, which costs no pass over the data to evaluate.

q(β) = F + gᵀΔ + ½ ΔᵀHΔ with Δ = β − β₀ around the mean of all candidates, β₀ = 1/N. `Mixture.surrogate` builds
one from a network; this package is pure mathematics.

Shape suffixes: N = candidates, M = mixtures.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias

import torch
from torch import Tensor

Curvature: TypeAlias = Literal["exact", "gauss-newton"]


@dataclass(frozen=True)
class Surrogate:
    """Second-order model of the loss around the mean of N candidates.

    Attributes:
        value: F, the loss at the mean.
        gradient_N: [N] float64 on the CPU, ∂F/∂β.
        hessian_NN: [N, N] float64 on the CPU, symmetric: the second derivatives, or their Gauss–Newton part, which is
            positive semidefinite if the loss is convex in the model's output.
        curvature: kind of second derivatives in ``hessian_NN``.
        note: the reason for not using the preferred curvature, or ``""``.
    Raises:
        ValueError: if the gradient or second derivatives are not finite.
    """

    value: float
    gradient_N: Tensor
    hessian_NN: Tensor
    curvature: Curvature
    note: str = ""

    def __post_init__(self) -> None:
        if not bool(self.gradient_N.isfinite().all() and self.hessian_NN.isfinite().all()):
            raise ValueError("the gradient or second derivatives of the surrogate are not finite")

    @property
    def n(self) -> int:
        """The number of candidates."""
        return len(self.gradient_N)

    def recentered(self, beta_N: Tensor, value: float, gradient_N: Tensor) -> Self:
        """Return a surrogate with this value and gradient [N] at ``beta_N`` [N], which sums to one, and the same H."""
        off_N = beta_N - 1 / self.n
        bend_N = self.hessian_NN @ off_N
        slope_N = gradient_N - bend_N
        return replace(self, value=value - float(off_N @ (slope_N + 0.5 * bend_N)), gradient_N=slope_N)

    def convex(self) -> Self:
        """Return the surrogate with the negative eigenvalues of H set to 0."""
        values_N, vectors_NN = torch.linalg.eigh(self.hessian_NN)
        return replace(self, hessian_NN=(vectors_NN * values_N.clamp(min=0)) @ vectors_NN.T)

    def __call__(self, beta_MN: Tensor) -> Tensor:
        """Return q of coefficients that sum to one: [M] for rows [M, N], [] for one row [N]."""
        off_MN = beta_MN - 1 / self.n
        return self.value + off_MN @ self.gradient_N + 0.5 * ((off_MN @ self.hessian_NN) * off_MN).sum(dim=-1)
