"""Score: how good a model is on one split of the data, with its noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from ckptavg.errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor


Split: TypeAlias = Literal["train", "val", "test", "fit", "held"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a model is on one split.

    Attributes:
        value: what strategies compare; larger is better. The metric (negated where smaller is better), else −loss.
        loss: the mean loss over examples, None where nothing but a score is known.
        metric: the mean metric over examples, as the task gives it, or None where it has none.
        examples: how many examples were averaged over, None where that is not known.
        each: what these are means of, where that was kept.
        resampled: where the metric is no mean over examples, `value` for a resample of the batches, by their numbers.
        batches: how many of them there are.
        invalid: why this is no score: what was NaN or infinite, and where. Its ``value`` is −∞, so nothing is worse.
    """

    value: float
    loss: float | None
    metric: float | None
    examples: int | None
    per_example: PerExample | None = field(default=None, compare=False, repr=False)
    resampled: Callable[[Sequence[int]], float] | None = field(default=None, compare=False, repr=False)
    batches: int = 0
    invalid: str = ""

    @property
    def noise(self) -> float:
        """The standard error of ``value``: what another sample of as many examples would change it by; ∞ if unknown."""
        if self.per_example is None or self.resampled is not None:
            return math.inf
        return _standard_error(self.per_example.values_U, self.per_example.examples_U)

    @property
    def loss_noise(self) -> float:
        """The standard error of ``loss``."""
        return (
            math.inf
            if self.per_example is None
            else _standard_error(self.per_example.losses_U, self.per_example.examples_U)
        )


def valid(score: Score, source: str | None = None) -> Score:
    """``score``, where that is what a whole run rests on.

    Raises:
        TaskError: if it is `Score.invalid`, naming the task's ``source``.
    """
    if score.invalid:
        raise TaskError(score.invalid, path=source, hint="look for broken examples in the data, and for broken weights")
    return score


def _standard_error(values_U: Tensor, examples_U: Tensor) -> float:
    """√(Σ w²(x − x̄)²)/Σ w, the weights being the examples a unit stands for; ∞ for a single unit."""
    if len(values_U) < 2:
        return math.inf
    mean = values_U.dot(examples_U) / examples_U.sum()
    return float(((values_U - mean) * examples_U).square().sum().sqrt() / examples_U.sum())


@dataclass(frozen=True, kw_only=True)
class PerExample:
    """The parts of a score: one for each example, or for each batch where the task gives only its mean.

    Attributes:
        values_U: [U] float64 on the CPU, on the scale of `Score.value`: larger is better.
        losses_U: [U], the losses.
        examples_U: [U], how many examples each stands for.
        order: tells apart the orders that the examples came in; equal for two scores whose units can be paired.
    """

    values_U: Tensor
    losses_U: Tensor
    examples_U: Tensor
    order: int = 0
