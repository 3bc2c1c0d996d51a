"""A two-line objective with a known optimum: ℓ(c) = mean (Σ_i c_i w_i)², with the interface of a network's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.objective import Hessian
from ckptavg.score import Score, Split
from ckptavg.surrogate import Surrogate
from ckptavg.surrogate.folds import Folds


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

    def surrogate(self) -> Surrogate:
        return self.folds(count=1).mean()

    def folds(self, on: Split | None = None, hessian: Hessian = "auto", count: int = 8) -> Folds:
        count, means = min(count, self.d), self.uniform()
        losses = [lambda c_N, f=f: self.each(c_N @ self.weights_ND)[f::count].mean() for f in range(count)]
        value_F, gradient_FN = self.gradients(Coefficients.uniform(range(self.n), self.n), on, count)
        hessian_FNN = [torch.autograd.functional.hessian(loss, means) for loss in losses]
        sizes = [len(range(f, self.d, count)) for f in range(count)]
        return Folds(torch.tensor(sizes).double(), value_F, gradient_FN, torch.stack(hessian_FNN), "exact")  # pyright: ignore

    def gradients(self, coefficients: Coefficients, on: Split | None = None, count: int = 8) -> tuple[Tensor, Tensor]:
        c_N = torch.tensor(coefficients.values[0], dtype=torch.float64, requires_grad=True)
        each_D = self.each(c_N @ self.weights_ND)
        losses = [each_D[f::count].mean() for f in range(min(count, self.d))]
        slopes = [torch.autograd.grad(loss, c_N, retain_graph=True)[0] for loss in losses]
        return torch.stack(losses).detach(), torch.stack([slope - slope.mean() for slope in slopes])

    def gradient(self, coefficients: Coefficients, on: Split | None = None) -> tuple[float, Tensor]:
        value_F, gradient_FN = self.gradients(coefficients, on, 1)
        return float(value_F[0]), gradient_FN[0]

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
        assert 0 < done <= total and all(float(value) == float(value) for value in figures.values()), stage
