"""Score of a model on one split of the data, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from ckptavg.errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor


Split: TypeAlias = Literal["train", "val", "test", "fit", "held"]
"""The task's three splits, and the two halves of the scored one: ``fit`` to train on, ``held`` to monitor."""


DATA: Final[Mapping[Split, str]] = {
    "train": "training", "val": "validation", "test": "test", "fit": "training", "held": "held-out",
}  # fmt: skip
"""The names of the splits in sentences."""


FEWEST: Final = 10  # units: of fewer that differ the coverage of every interval tried is far from 95 %
METRIC: Final = "metric"
"""The name of a task's metric if it gives only one."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score of a model on one split.

    Attributes:
        value: the number that strategies compare, larger is better: the metric (negated if smaller is better), else
            −loss.
        loss: the mean loss over examples; None if only a score is known.
        metric: the mean metric over examples, as the task returns it; None if the task has no metric.
        examples: the number of examples averaged over; None if unknown.
        per_example: the values these are means of, if they were kept.
        resampled: for a metric that is not a mean over examples, returns `value` for a resample of batch indices.
        batches: the number of batches to resample.
        loss_noise: standard error of ``loss``; ∞ if unknown.
        invalid: the reason this score is unusable: which value was NaN or infinite, and where. ``value`` is then −∞,
            so no other score is lower.
        name: the name of ``metric``.
        others: the score by each other metric of the same pass, by name; these decide nothing.
    """

    value: float
    loss: float | None
    metric: float | None
    examples: int | None
    per_example: PerExample | None = field(default=None, compare=False, repr=False)
    resampled: Callable[[Sequence[int]], float] | None = field(default=None, compare=False, repr=False)
    batches: int = 0
    loss_noise: float = field(default=math.inf, compare=False, repr=False)
    invalid: str = ""
    name: str = METRIC
    others: Mapping[str, Score] = field(default_factory=dict, compare=False, repr=False)

    @property
    def metrics(self) -> dict[str, float | None]:
        """All metrics by name, the deciding one first; empty if there is none but an unnamed one."""
        if not self.others and self.name == METRIC:
            return {}
        own = {} if self.metric is None else {self.name: self.metric}
        return own | {name: score.metric for name, score in self.others.items()}

    @property
    def figures(self) -> dict[str, float]:
        """The deciding metric, the loss and the other metrics by name, without those that are unknown."""
        own = {self.name: self.metric, "loss": self.loss} if self.metric is not None else {"loss": self.loss}
        named = own | {name: score.metric for name, score in self.others.items()}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def errors(self) -> dict[str, float]:
        """Standard errors of the `figures`; ∞ if unknown."""
        own = {self.name: self.noise, "loss": self.loss_noise}
        known = own | {name: score.noise for name, score in self.others.items()}
        return {name: known[name] for name in self.figures}

    @property
    def noise(self) -> float:
        """Standard error of ``value``: its typical change under another sample of as many examples; ∞ if unknown."""
        if self.per_example is None or self.resampled is not None:
            return math.inf
        return standard_error(self.per_example.values_U, self.per_example.examples_U)


def decided(scores: Mapping[str, Score], key: str) -> Score:
    """Return the score by the metric ``key``, with the other ones as its `Score.others`."""
    return replace(scores[key], name=key, others={name: score for name, score in scores.items() if name != key})


def sign(goal: str | Mapping[str, str], name: str) -> float:
    """Return −1 if a smaller value of the metric ``name`` is better, else 1; a mapping has goals by name."""
    return -1.0 if (goal if isinstance(goal, str) else goal.get(name, "max")) == "min" else 1.0


def valid(score: Score, source: str | None = None) -> Score:
    """Return ``score`` after checking that it is usable.

    Raises:
        TaskError: if ``score`` is `Score.invalid`; names the task's ``source``.
    """
    if score.invalid:
        raise TaskError(score.invalid, path=source, hint="look for broken examples in the data, and for broken weights")
    return score


def differs(first: Score, second: Score, eps: float = 0.0) -> bool:
    """Return whether scores of two copies of one model differ by more than rounding, or noise if unpaired.

    Rounding may change a loss by 1e-3 of its size and of its spread over examples, and the metric of a few examples;
    in a model whose numbers have a relative spacing ``eps``, such as 2⁻⁷ in bfloat16, also by two of them.
    """
    rounding = max(1e-3, 2 * eps)
    each, other = first.per_example, second.per_example
    value_gap = abs(first.value - second.value)
    if each is None or other is None or each.order != other.order:
        noise = min(first.noise, second.noise)
        return value_gap > rounding * abs(first.value) and (math.isinf(noise) or value_gap > 6 * noise)
    largest = float(each.values_U.abs().max())
    if (
        value_gap > max(0.01, rounding) * abs(first.value) + 3 * largest / len(each.values_U) + 1e-6
        and first.metric is not None
    ):
        return True
    if first.loss is None or second.loss is None:
        return False
    spread = first.loss_noise * math.sqrt(len(each.values_U)) if math.isfinite(first.loss_noise) else 0.0
    return abs(first.loss - second.loss) > rounding * (abs(first.loss) + spread) + 1e-6


def difference_error(first: Score, second: Score) -> float:
    """Return the standard error of the difference of two values over the same examples.

    It is 0 if it is unknown, as for fewer than `FEWEST` units.
    """
    each, other = first.per_example, second.per_example
    resampled = first.resampled is not None or second.resampled is not None
    if each is None or other is None or each.order != other.order or resampled or len(each.values_U) < FEWEST:
        return 0.0
    return standard_error(each.values_U - other.values_U, each.examples_U)


def standard_error(values_U: Tensor, examples_U: Tensor) -> float:
    """Return √(Σ w²(x − x̄)²)/Σ w, each weight w being the number of examples in a unit; ∞ for a single unit."""
    if len(values_U) < 2:
        return math.inf
    mean = values_U.dot(examples_U) / examples_U.sum()
    return float(((values_U - mean) * examples_U).square().sum().sqrt() / examples_U.sum())


@dataclass(frozen=True, kw_only=True)
class PerExample:
    """Units of a score: one per example, or one per batch if the task returns only a batch mean.

    Attributes:
        values_U: [U] float64 on the CPU, on the scale of `Score.value`: larger is better.
        examples_U: [U], the number of examples in each unit.
        order: checksum of the examples in order; equal for two scores whose units can be paired.
    """

    values_U: Tensor
    examples_U: Tensor
    order: int = 0
