"""Quadratic models of the loss on the folds of the examples: one pass makes all of them, because a loss is a sum.

Shape suffixes: F = folds, N = candidates.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ckptavg.surrogate import Curvature, Surrogate


@dataclass(frozen=True)
class Folds:
    """One `Surrogate` for each fold, around the mean of all candidates; float64 on the CPU.

    Attributes:
        examples_F: [F], the number of examples of each fold, > 0.
        value_F: [F], the mean loss of each fold at the mean.
        gradient_FN: [F, N], its gradients.
        hessian_FNN: [F, N, N], its second derivatives; see `Surrogate`.
        curvature: the kind of second derivatives.
        note: the reason for not using the preferred curvature, or ``""``.
    """

    examples_F: Tensor
    value_F: Tensor
    gradient_FN: Tensor
    hessian_FNN: Tensor
    curvature: Curvature
    note: str = ""

    def __len__(self) -> int:
        """Return the number of folds F."""
        return len(self.examples_F)

    def mean(self, weights_F: Tensor | None = None) -> Surrogate:
        """Return the surrogate of all examples, or of folds with these weights [F] ≥ 0."""
        share_F = self.examples_F if weights_F is None else self.examples_F * weights_F
        share_F = share_F / share_F.sum()
        return Surrogate(
            float(share_F @ self.value_F), share_F @ self.gradient_FN,
            torch.tensordot(share_F, self.hessian_FNN, dims=1), self.curvature, self.note,
        )  # fmt: skip

    def without(self, fold: int) -> Surrogate:
        """Return the surrogate of the examples outside a fold."""
        return self.mean(torch.arange(len(self)) != fold)

    def only(self, fold: int) -> Surrogate:
        """Return the surrogate of the examples in a fold."""
        return self.mean(torch.arange(len(self)) == fold)

    def recentered(self, beta_N: Tensor, value_F: Tensor, gradient_FN: Tensor) -> Self:
        """Return folds with these values [F] and gradients [F, N] at ``beta_N`` [N]; see `Surrogate.recentered`."""
        moved = [self.only(f).recentered(beta_N, float(value_F[f]), gradient_FN[f]) for f in range(len(self))]
        return replace(
            self, value_F=torch.tensor([q.value for q in moved], dtype=torch.float64),
            gradient_FN=torch.stack([q.gradient_N for q in moved]),
        )  # fmt: skip
