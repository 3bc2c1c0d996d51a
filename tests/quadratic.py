"""A two-line objective with a known optimum: ℓ(c) = mean (Σ_i c_i w_i)². A strategy cannot tell it from a network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.objective import Score, Split


class Quadratic:
    """N random vectors around a common offset; the best mixture is the one nearest to zero."""

    def __init__(self, n: int, d: int, seed: int, scale: float = 1.0) -> None:
        self.n, self.d = n, d
        self.generator = torch.Generator().manual_seed(seed)
        draws = torch.Generator().manual_seed(1000 + seed)
        offset = torch.randn(1, d, generator=draws, dtype=torch.float64)
        self.weights_ND = scale * (torch.randn(n, d, generator=draws, dtype=torch.float64) + 0.5 * offset)

    def uniform(self) -> Tensor:
        return torch.full((self.n,), 1 / self.n, dtype=torch.float64)

    def loss(self, c_N: Tensor, on: Split | None = None) -> Tensor:
        return (c_N @ self.weights_ND).square().mean()

    def of_subset(self, subset: Iterable[int]) -> float:
        return float(self.weights_ND[list(subset)].mean(dim=0).square().mean())

    def score(self, coefficients: Coefficients) -> Score:
        loss = float(self.loss(torch.tensor(coefficients.values[0], dtype=torch.float64)))
        return Score(value=-loss, loss=loss, metric=None, examples=1)

    def progress(self, stage: str, done: int, total: int, **figures: Tensor | float) -> None:
        assert 0 < done <= total and all(float(value) == float(value) for value in figures.values()), stage
