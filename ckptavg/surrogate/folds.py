"""Quadratic models of the loss on folds of the examples, with common second derivatives.

The gradients of all folds come from one pass, because a loss is a sum over examples. The second derivatives of a fold
differ little from those of all examples, so they are measured once, and a part of the examples is enough.

Shape suffixes: F = folds, N = candidates.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ckptavg.surrogate import Surrogate


@dataclass(frozen=True)
class Folds:
    """One `Surrogate` for each fold; float64 on the CPU.

    Attributes:
        q: the surrogate of all examples.
        share_F: [F], the fraction of the examples in each fold.
        value_F: [F], the mean loss of each fold at the mean of the candidates.
        gradient_FN: [F, N], its gradients there.
    """

    q: Surrogate
    share_F: Tensor
    value_F: Tensor
    gradient_FN: Tensor

    def __len__(self) -> int:
        """Return the number of folds F."""
        return len(self.share_F)

    @classmethod
    def at(cls, beta_N: Tensor, q: Surrogate, examples_F: Tensor, value_F: Tensor, gradient_FN: Tensor) -> Self:
        """Return the folds with these losses and gradients at ``beta_N`` [N], and the second derivatives of ``q``."""
        share_F = examples_F / examples_F.sum()
        moved = [q.recentered(beta_N, *fold) for fold in zip(value_F.tolist(), gradient_FN, strict=True)]
        values_F = torch.tensor([fold.value for fold in moved], dtype=torch.float64)
        slopes_FN = torch.stack([fold.gradient_N for fold in moved])
        return cls(cls._mixed(q, share_F, values_F, slopes_FN), share_F, values_F, slopes_FN)

    def without(self, fold: int) -> Surrogate:
        """Return the surrogate of the examples outside a fold, of all examples if there is no other fold."""
        if len(self) == 1:
            return self.q
        kept_F = self.share_F * (torch.arange(len(self)) != fold)
        return self._mixed(self.q, kept_F / kept_F.sum(), self.value_F, self.gradient_FN)

    def only(self, fold: int) -> Surrogate:
        """Return the surrogate of the examples in a fold."""
        return replace(self.q, value=float(self.value_F[fold]), gradient_N=self.gradient_FN[fold])

    @staticmethod
    def _mixed(q: Surrogate, share_F: Tensor, value_F: Tensor, gradient_FN: Tensor) -> Surrogate:
        return replace(q, value=float(share_F @ value_F), gradient_N=share_F @ gradient_FN)
