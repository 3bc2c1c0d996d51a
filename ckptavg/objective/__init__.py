"""What a strategy may ask, and what it answers: the seam between mathematics and everything else.

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
"""Whose data: the task's own three, and the two halves of what is scored on: one to fit, one held out to watch."""


class Objective(Protocol):
    """Loss and score of a mixture of checkpoints, as functions of its coefficients alone.

    Files, devices, precision and the model are hidden behind this. A strategy that is given a two-line quadratic
    instead of a network cannot tell the difference, which is how every strategy is tested.
    """

    @property
    def n(self) -> int:
        """The number of candidates N, in training order."""
        ...

    @property
    def generator(self) -> torch.Generator:
        """The seeded source of every random number a strategy draws; on the CPU, so that devices agree."""
        ...

    def uniform(self) -> Tensor:
        """[N], 1/N each, where `loss` wants its coefficients to be; derive tensors from it to stay there."""
        ...

    @property
    def differentiable(self) -> bool:
        """Whether there is a `loss`; where there is only a score, a strategy must search by it."""
        ...

    @property
    def scored_on(self) -> Split:
        """The data of `score`: the validation data where the task has some, else the training data."""
        ...

    def batches(self, on: Split) -> int:
        """How many batches one pass over a split has."""
        ...

    def blocks(self, size: int | None) -> Groups:
        """The model's tensors in groups, for coefficients of their own.

        Args:
            size: None puts the tensors of one module together. A number walks over the tensors in the model's order
                and opens a new block when the present one has more than ``size`` elements; 0 is one block a tensor.
        """
        ...

    def distances(self, groups: Groups) -> Tensor:
        """[G, N], ‖w_i − w̄‖₂ over the parameters of each group, where `uniform` lies; w̄ is the mean of all N."""
        ...

    def loss(self, c_N: Tensor, on: Split | None = None, *, groups: Groups = EVERYTHING, again: bool = False) -> Tensor:
        """The mean loss at w = Σ_i c_i w_i on the next batch, differentiable in ``c_N``.

        ∂ℓ/∂c_i = ⟨w_i, ∂ℓ/∂w⟩. BatchNorm normalises with the batch's own statistics, dropout is off.

        Args:
            c_N: [N] coefficients that sum to one, on the device of `uniform`; [G, N] where there are several groups.
            on: the data; None is `scored_on`.
            groups: what each row of coefficients is for.
            again: on the batch of the call before instead.
        """
        ...

    def surrogate(self, on: Split | None = None, hessian: Hessian = "auto") -> Surrogate:
        """The loss around the mean of all, to second order in the coefficients, in one pass over ``on``.

        Raises:
            TaskError: if the curvature asked for cannot be had of this model.
        """
        ...

    def gradient(self, coefficients: Coefficients, on: Split | None = None) -> tuple[float, Tensor]:
        """The mean loss over ``on`` and its gradient along Σ c = 1, [N] float64 on the CPU, in one pass.

        Like `loss` and `surrogate`, with BatchNorm by the batches' own statistics.

        Raises:
            TaskError: if the loss has no gradient, or is NaN or infinite.
        """
        ...

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None) -> None:
        """Say which scores will be asked for, whatever they are: several workers then measure them side by side."""
        ...

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """The score on ``on`` (None is `scored_on`), BatchNorm recomputed; remembered, so asking again is free.

        Where loss or metric is NaN or infinite it is `Score.invalid` and has the value −∞.
        """
        ...

    def score_at_least(self, coefficients: Coefficients, bar: float, *, strict: bool) -> Score | None:
        """The score where its value is ≥ ``bar`` (> if ``strict``), else None.

        What is None is known without the batches that could not have changed it any more: for a metric within known
        bounds, the sum so far and the best that the remaining examples could add may already stay below the bar.
        """
        ...

    def progress(self, stage: str, done: int, total: int, **figures: Tensor | float) -> None:
        """Say how far the work is; cheap enough to be called every step (figures are looked at now and then)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a strategy found, and how.

    Attributes:
        coefficients: the answer.
        columns: name → one number or word for each candidate (None where there is none), shown beside it.
        trace: name → one number for each step.
        notes: what a reader of the report should know, a sentence each.
        tables: title → rows, each of them column → value.
    """

    coefficients: Coefficients
    columns: Mapping[str, Sequence[float | str | None]] = field(default_factory=dict[str, Sequence[float | str | None]])
    trace: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    notes: Sequence[str] = ()
    tables: Mapping[str, Sequence[Mapping[str, float | str | None]]] = field(
        default_factory=dict[str, Sequence[Mapping[str, float | str | None]]]
    )


class Strategy(Protocol):
    """A frozen keyword-only dataclass of settings that turns an objective into coefficients.

    A field ``name: Annotated[type, "help"] = default`` is also the command's option ``--name``.
    """

    needs_task: ClassVar[bool]

    def learn(self, objective: Objective) -> Learned:
        """The coefficients for the N candidates of ``objective``.

        Raises:
            UsageError: if the settings do not fit the candidates.
        """
        ...


def check_losses(
    losses: Sequence[float], objective: Objective, on: Split | None, *, first: int = 0, samples: int = 1
) -> None:
    """Raise TaskError for a loss that is NaN or infinite: what was learned from it is worth nothing.

    Args:
        losses: of consecutive steps.
        objective: gave them.
        on: the data they were of.
        first: the number of the first step, from 0.
        samples: batches that a step takes.
    """
    for step, loss in enumerate(losses, first):
        if not math.isfinite(loss):
            split, count = on or objective.scored_on, objective.batches(on or objective.scored_on)
            numbers = sorted({(step * samples + i) % count + 1 for i in range(samples)})
            shown = f"batch{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} of the {split} data"
            raise TaskError(
                f"loss() gave {loss} at step {step + 1} of the search, on {shown}",
                hint="look for broken examples in the data it learns from, or choose a smaller --lr",
            )


def scored_alone(objective: Objective) -> list[float]:
    """The score of each candidate alone, larger is better."""
    alone = [Coefficients.uniform([i], objective.n) for i in range(objective.n)]
    objective.prefetch(alone)
    scores: list[float] = []
    for i, one in enumerate(alone):
        scores.append(objective.score(one).value)
        objective.progress("scoring candidates", i + 1, objective.n)
    return scores
