"""Objectives without a network: ℓ(c) = mean (Σ_i c_i w_i)², and random surrogates.

Shape suffixes: N = candidates, D = dimensions of a vector w_i, F = folds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.errors import UsageError
from ckptavg.objective import FOLDS, Hessian, Learned
from ckptavg.score import Score, Split
from ckptavg.surrogate import Surrogate


class Quadratic:
    """N random vectors around a common offset; the best mixture is the one nearest to zero."""

    def __init__(self, n: int, d: int, seed: int, scale: float = 1.0) -> None:
        self.n, self.d, self.runs = n, d, [0] * n
        self.generator = torch.Generator().manual_seed(seed)
        draws = torch.Generator().manual_seed(1000 + seed)
        offset = torch.randn(1, d, generator=draws, dtype=torch.float64)
        self.weights_ND = scale * (torch.randn(n, d, generator=draws, dtype=torch.float64) + 0.5 * offset)

    def uniform(self) -> Tensor:
        return torch.full((self.n,), 1 / self.n, dtype=torch.float64)

    @property
    def losses(self) -> Quadratic:
        return self

    scored_on: Split = "val"

    def batches(self, on: Split) -> int:
        return 3

    def blocks(self, size: int | None) -> Groups:
        """Return the blocks: every element is a separate tensor."""
        return tuple((f"{d}.",) for d in range(self.d))

    def distances(self, groups: Groups) -> Tensor:
        off_ND = self.weights_ND - self.weights_ND.mean(dim=0)
        return off_ND.norm(dim=1).unsqueeze(0) if len(groups) == 1 else off_ND.abs().T

    def each(self, v_D: Tensor) -> Tensor:
        """Return the loss of each dimension of the mixture v: every dimension is an example."""
        return v_D.square()

    def loss(self, c_N: Tensor, on: Split | None = None, *, groups: Groups = EVERYTHING, again: bool = False) -> Tensor:
        return self.each(c_N @ self.weights_ND if len(groups) == 1 else (c_N * self.weights_ND.T).sum(dim=1)).mean()

    def surrogate(self, on: Split | None = None, hessian: Hessian = "auto", examples: int | None = None) -> Surrogate:
        mean = Coefficients.uniform(range(self.n), self.n)
        hessian_NN = torch.autograd.functional.hessian(
            lambda c_N: self.each(c_N @ self.weights_ND)[:examples].mean(), self.uniform()
        )
        assert isinstance(hessian_NN, Tensor)
        return Surrogate(*self.gradient(mean, on), hessian_NN, "exact")

    def gradients(
        self, coefficients: Coefficients, on: Split | None = None, folds: int = FOLDS
    ) -> tuple[Tensor, Tensor, Tensor]:
        c_N = torch.tensor(coefficients.values[0], dtype=torch.float64, requires_grad=True)
        parts = [self.each(c_N @ self.weights_ND)[fold::folds] for fold in range(min(folds, self.d))]
        examples_F = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
        value_F = torch.stack([part.mean() for part in parts])
        slopes = [torch.autograd.grad(value, c_N, retain_graph=True)[0] for value in value_F]
        return examples_F, value_F.detach(), torch.stack([slope - slope.mean() for slope in slopes])

    def gradient(self, coefficients: Coefficients, on: Split | None = None) -> tuple[float, Tensor]:
        _, value_F, gradient_FN = self.gradients(coefficients, on, 1)
        return float(value_F[0]), gradient_FN[0]

    def outputs(self, on: Split | None = None) -> Any:
        """Refuse, as of a network: v is what the loss is computed from, but there are no outputs."""
        raise UsageError("the output is not linear in its weights")

    def check_any_sum(self) -> None:
        """Do nothing: v is a linear combination for any coefficients."""

    def of_subset(self, subset: Iterable[int]) -> float:
        return float(self.weights_ND[list(subset)].mean(dim=0).square().mean())

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None) -> None:
        """Do nothing: a single process has no work to do ahead."""

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        c_GN = torch.tensor(coefficients.values, dtype=torch.float64)
        loss = float(self.loss(c_GN if len(c_GN) > 1 else c_GN[0], groups=coefficients.groups))
        return Score(value=-loss, loss=loss, metric=None, examples=1)

    def score_at_least(self, coefficients: Coefficients, threshold: float, *, strict: bool) -> Score | None:
        score = self.score(coefficients)
        return score if (score.value > threshold if strict else score.value >= threshold) else None

    def progress(self, stage: str, done: int, total: int, **figures: Tensor | float) -> None:
        assert 0 <= done <= total and all(float(value) == float(value) for value in figures.values()), stage


class Curved(Quadratic):
    """ℓ(c) = mean (v² + v⁴), v = Σ_i c_i w_i: not quadratic, so the surrogate at the mean is wrong elsewhere."""

    def each(self, v_D: Tensor) -> Tensor:
        return v_D.square() + v_D.square().square()


class Regression(Quadratic):
    """Squared errors of linear models near the truth; the label noise is all that they share.

    Every dimension of w_i is an example: the residual of model i there. Mixed residuals are those of the mixed model.
    """

    def __init__(self, n: int, examples: int, seed: int) -> None:
        super().__init__(n, examples, seed)
        draws = torch.Generator().manual_seed(seed)
        off_NP = 0.5 * torch.randn(n, 30, generator=draws, dtype=torch.float64)

        def residuals(size: int) -> Tensor:
            inputs_PB = torch.randn(30, size, generator=draws, dtype=torch.float64)
            return off_NP @ inputs_PB + 2 * torch.randn(size, generator=draws, dtype=torch.float64)

        self.weights_ND, self.fresh_ND = residuals(examples), residuals(5000)

    def fresh(self, mixture: Coefficients) -> float:
        """Return the loss on other examples of the same distribution."""
        return float((torch.tensor(mixture.values[0], dtype=torch.float64) @ self.fresh_ND).square().mean())


def loss_of(objective: Quadratic, mixture: Coefficients) -> float:
    loss = objective.score(mixture).loss
    assert loss is not None
    return loss


def plain(objective: Quadratic) -> list[Coefficients]:
    """Return the single candidates and the mean of all."""
    return [*Coefficients.singles(objective.n), Coefficients.uniform(range(objective.n), objective.n)]


def random_surrogate(n: int, seed: int, *, psd: bool = True, slope: float = 1.0, rank: int | None = None) -> Surrogate:
    draws = torch.Generator().manual_seed(seed)
    half = torch.randn(n, rank or 2 * n, generator=draws, dtype=torch.float64)
    square = torch.randn(n, n, generator=draws, dtype=torch.float64)
    hessian = half @ half.T / half.shape[1] if psd else (square + square.T) / 2
    return Surrogate(1.5, slope * torch.randn(n, generator=draws, dtype=torch.float64), hessian, "exact")


def rows_of(learned: Learned) -> list[dict[str, Any]]:
    (rows,) = learned.tables.values()
    return list(rows)
