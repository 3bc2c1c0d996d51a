"""The interface between strategies and models: `Objective` is a strategy's input, `Learned` its result.

Shape suffixes: N = candidates, G = groups of tensors, U = units of a score (examples, or batches).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias

from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.errors import TaskError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ckptavg.surrogate import Surrogate

from ckptavg.score import Score, Split

Parallel: TypeAlias = Literal["auto", "batches", "candidates"]

Hessian: TypeAlias = Literal["auto", "exact", "gauss-newton"]
"""Which second derivative `Objective.surrogate` uses; ``auto`` prefers Gauss–Newton."""


class Objective(Protocol):
    """Loss and score of a mixture of checkpoints as functions of its coefficients alone.

    Files, devices, precision and the model are hidden behind this interface, so strategies are tested on a two-line
    quadratic in place of a network.
    """

    @property
    def n(self) -> int:
        """The number of candidates N, in training order."""
        ...

    @property
    def generator(self) -> torch.Generator:
        """The seeded generator for all random numbers of a strategy; on the CPU, so results match across devices."""
        ...

    def uniform(self) -> Tensor:
        """Return [N] coefficients of 1/N, on the device and in the dtype that `loss` takes; derive others from them."""
        ...

    @property
    def differentiable(self) -> bool:
        """True if `loss` is available; otherwise strategies must search by `score`."""
        ...

    @property
    def scored_on(self) -> Split:
        """The split that `score` uses: validation data if the task has any, else training data."""
        ...

    def batches(self, on: Split) -> int:
        """Return the number of batches in one pass over a split."""
        ...

    def blocks(self, size: int | None) -> Groups:
        """Group the model's tensors into blocks, each with its own coefficients.

        Args:
            size: None makes one block per module. A number adds tensors in the model's order and starts a new block
                once the current one has more than ``size`` elements; 0 makes one block per tensor.
        """
        ...

    def distances(self, groups: Groups) -> Tensor:
        """Return ‖w_i − w̄‖₂ over the parameters of each group, [G, N], on the device of `uniform`; w̄ = Σ_i w_i/N."""
        ...

    def loss(self, c_N: Tensor, on: Split | None = None, *, groups: Groups = EVERYTHING, again: bool = False) -> Tensor:
        """Return the mean loss at w = Σ_i c_i w_i on the next batch, differentiable in ``c_N``.

        ∂ℓ/∂c_i = ⟨w_i, ∂ℓ/∂w⟩. BatchNorm normalises with the batch's own statistics, dropout is off.

        Args:
            c_N: [N] coefficients that sum to one, on the device of `uniform`; [G, N] for several groups.
            on: the split; None is `scored_on`.
            groups: the tensors that each row of coefficients applies to.
            again: reuse the batch of the previous call.
        """
        ...

    def surrogate(self, on: Split | None = None, hessian: Hessian = "auto") -> Surrogate:
        """Expand the loss around the mean of all candidates to second order in the coefficients; one pass over ``on``.

        Raises:
            TaskError: if this model does not support the requested curvature.
        """
        ...

    def gradient(self, coefficients: Coefficients, on: Split | None = None) -> tuple[float, Tensor]:
        """Return the mean loss over ``on`` and its gradient along Σ c = 1, [N] float64 on the CPU, in one pass.

        As in `loss` and `surrogate`, BatchNorm uses the batches' own statistics.

        Raises:
            TaskError: if the loss has no gradient, or is NaN or infinite.
        """
        ...

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None) -> None:
        """Announce scores that will be requested whatever their values, so that several ranks score in parallel."""
        ...

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """Return the score on ``on`` (None is `scored_on`), BatchNorm recomputed; cached, so repeated calls are free.

        If the loss or metric is NaN or infinite, the score is `Score.invalid` and has the value −∞.
        """
        ...

    def score_at_least(self, coefficients: Coefficients, threshold: float, *, strict: bool) -> Score | None:
        """Return the score if its value is ≥ ``threshold`` (> if ``strict``), else None.

        For a metric with known bounds, returns None as soon as the remaining examples cannot lift the score to
        ``threshold``: the sum so far plus the best possible value of every remaining example is still below it.
        """
        ...

    def progress(self, stage: str, done: int, total: int, **metrics: Tensor | float) -> None:
        """Report progress; cheap enough to call every step, since metrics are read only a few times a second."""
        ...


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Result of a strategy.

    Attributes:
        coefficients: the coefficients of the average.
        columns: name → one number or word per candidate (None if missing), shown beside it in the report.
        trace: name → one number per step.
        notes: remarks for the report, one sentence each.
        tables: title → rows, each mapping column → value.
    """

    coefficients: Coefficients
    columns: Mapping[str, Sequence[float | str | None]] = field(default_factory=dict[str, Sequence[float | str | None]])
    trace: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    notes: Sequence[str] = ()
    tables: Mapping[str, Sequence[Mapping[str, float | str | None]]] = field(
        default_factory=dict[str, Sequence[Mapping[str, float | str | None]]]
    )


class Strategy(Protocol):
    """A frozen keyword-only dataclass of settings, with a method that chooses the coefficients.

    A field ``name: Annotated[type, "help"] = default`` is also the command's option ``--name``.
    """

    needs_task: ClassVar[bool]

    def learn(self, objective: Objective) -> Learned:
        """Choose coefficients for the N candidates of ``objective``.

        Raises:
            UsageError: if the settings do not fit the candidates.
        """
        ...


def check_losses(
    losses: Sequence[float], objective: Objective, on: Split | None, *, first: int = 0, samples: int = 1
) -> None:
    """Raise TaskError if a loss is NaN or infinite: coefficients trained on it are worthless.

    Args:
        losses: the losses of consecutive steps.
        objective: the objective that computed them.
        on: the split they were computed on.
        first: the index of the first step, from 0.
        samples: batches per step.
    """
    for step, loss in enumerate(losses, first):
        if not math.isfinite(loss):
            split, count = on or objective.scored_on, objective.batches(on or objective.scored_on)
            numbers = sorted({(step * samples + i) % count + 1 for i in range(samples)})
            where = f"batch{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} of the {split} data"
            raise TaskError(
                f"loss() gave {loss} at step {step + 1} of the search, on {where}",
                hint=f"look for broken examples in the {split} data, or choose a smaller --lr",
            )


def scored_alone(objective: Objective) -> list[float]:
    """Return the score of each single candidate; larger is better."""
    one_hot = [Coefficients.uniform([i], objective.n) for i in range(objective.n)]
    objective.prefetch(one_hot)
    scores: list[float] = []
    for i, coefficients in enumerate(one_hot):
        scores.append(objective.score(coefficients).value)
        objective.progress("scoring candidates", i + 1, objective.n)
    return scores
