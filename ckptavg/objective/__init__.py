"""The interface between strategies and models: `Objective` is a strategy's input, `Learned` its result.

Shape suffixes: N = candidates, G = groups of tensors, U = units of a score (examples, or batches).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Protocol, TypeAlias

from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.errors import TaskError, TooFewError, UsageError, counted
from ckptavg.runtime.estimate import Stage
from ckptavg.score import Score, Split

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ckptavg.objective.output_losses import OutputLosses
    from ckptavg.surrogate import Surrogate

SelectBy: TypeAlias = Literal["auto", "loss", "metric"]
"""Criterion of the choice among scored mixtures; see `ckptavg.objective.selection.Selection`."""

Hessian: TypeAlias = Literal["auto", "exact", "gauss-newton"]
"""Which second derivative `Losses.surrogate` uses; ``auto`` prefers Gauss–Newton."""

FOLDS: Final = 8
"""The number of folds of a cross-validation."""


class Losses(Protocol):
    """The loss of a mixture and its gradients as functions of the coefficients, batch by batch or over a split."""

    def uniform(self) -> Tensor:
        """Return [N] coefficients of 1/N, on the device and in the dtype that `loss` takes; derive others from them."""
        ...

    def batches(self, split: Split) -> int:
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
            c_N: [N] coefficients of sum one (but `check_any_sum`), on the device of `uniform`; [G, N] for groups.
            on: the split; None is `Objective.scored_on`.
            groups: the tensors that each row of coefficients applies to.
            again: reuse the batch of the previous call.
        """
        ...

    def surrogate(self, on: Split | None = None, hessian: Hessian = "auto", examples: int | None = None) -> Surrogate:
        """Expand the loss around the mean of all candidates to second order in the coefficients; one pass over ``on``.

        Args:
            on: the split; None is `Objective.scored_on`.
            hessian: the second derivatives.
            examples: the number of examples that are enough, in whole batches; None is all.
        Raises:
            TaskError: if this model does not support the requested curvature.
        """
        ...

    def gradients(
        self, coefficients: Coefficients, on: Split | None = None, folds: int = FOLDS
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the examples of each fold [F], their mean loss [F] and its gradient along Σ c = 1 [F, N], in one pass.

        Batches, or their parts if the loss has one value per example, are dealt to the folds in turn; F is smaller than
        ``folds`` if there are fewer. All are float64 on the CPU. BatchNorm is as in `loss` and `surrogate`.

        Raises:
            NotFiniteError: if the loss is NaN or infinite.
            TaskError: if it has no gradient.
        """
        ...

    def gradient(self, coefficients: Coefficients, on: Split | None = None) -> tuple[float, Tensor]:
        """Return the mean loss over ``on`` and its gradient [N], as `gradients` with a single fold."""
        ...

    def outputs(self, on: Split | None = None) -> OutputLosses:
        """Run each candidate once over ``on``, and return the loss as a function of combinations of the outputs.

        Raises:
            TaskError: if the model's output is not linear in its weights, or does not decide the loss.
            UsageError: as `check_any_sum`.
        """
        ...

    def check_any_sum(self) -> None:
        """Raise UsageError if `loss` and the average need coefficients that sum to one, whatever the model."""


class Objective(Protocol):
    """Score and loss of a mixture of checkpoints as functions of its coefficients alone.

    Files, devices, precision and the model are hidden behind this interface, so strategies are tested on a two-line
    quadratic in place of a network.

    Attributes:
        n: the number of candidates N, in training order.
        runs: the run of each candidate.
        generator: seeded, for all random numbers of a strategy; on the CPU, so results match across devices.
        losses: the losses and their gradients; None if mixtures have only scores, by which a strategy must search then.
        scored_on: the split that `score` uses: validation data if the task has any, else training data.
    """

    n: int
    runs: Sequence[int]
    generator: torch.Generator
    losses: Losses | None
    scored_on: Split

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None) -> None:
        """Announce scores that will be requested whatever their values, so that several ranks score in parallel."""

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


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Result of a strategy.

    Attributes:
        coefficients: the coefficients of the average.
        columns: name → one number or word per candidate (None if missing), shown beside it in the report.
        trace: name → one number per step, or one list of numbers.
        notes: remarks for the report, one sentence each.
        tables: title → rows, each mapping column → value.
        held_out: loss plus the optimism found by cross-validation (held-out minus fitted loss of the quadratic).
    """

    coefficients: Coefficients
    columns: Mapping[str, Sequence[float | str | None]] = field(default_factory=dict)
    trace: Mapping[str, Sequence[float | Sequence[float]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tables: Mapping[str, Sequence[Mapping[str, float | str | None]]] = field(default_factory=dict)
    held_out: float | None = None


class Strategy(Protocol):
    """A frozen keyword-only dataclass of settings that inherits from this, with a method that chooses the coefficients.

    A field ``name: Annotated[type, "help"] = default`` is also the command's option ``--name``.

    Attributes:
        follows: whether it can run beside a training, with ``--follow``: it takes scores alone, and one more candidate
            needs few that fewer candidates did not.
    """

    follows: ClassVar[bool] = False

    def check(self, n: int, splits: Collection[Split], *, bounded: bool) -> None:
        """Refuse settings that the candidates or the task cannot satisfy, before hours of work; by default none.

        Args:
            n: the number of candidates.
            splits: the splits that have losses; none if mixtures have only scores.
            bounded: True if the metric has known bounds.
        Raises:
            UsageError: if the settings do not fit.
        """

    def stages(self, n: int, losses: Losses | None, scored_on: Split) -> Sequence[Stage] | None:
        """Return the stages that `learn` reports for ``n`` candidates, with the most they take; None if unknown."""

    def learn(self, objective: Objective) -> Learned:
        """Choose coefficients for the N candidates of ``objective``."""
        ...


class PlainAverage(Strategy):
    """A strategy whose coefficients depend on nothing but the number of candidates of each run: it needs no task.

    Attributes:
        by_run: whether each run is averaged by itself; a field of this name with the help `BY_RUN` makes it an option.
    """

    by_run: bool = False

    @abstractmethod
    def coefficients(self, n: int) -> Coefficients:
        """Return the coefficients of ``n`` candidates of one run."""

    def average(self, runs: Sequence[int]) -> Learned:
        """Return the coefficients of candidates of these runs; with `by_run` those within each of R runs, over R."""
        members = {run: [i for i, own in enumerate(runs) if own == run] for run in runs}
        if not self.by_run or len(members) < 2:
            return Learned(coefficients=self.coefficients(len(runs)))
        row = [0.0] * len(runs)
        for own in members.values():
            for i, c in zip(own, self.coefficients(len(own)).values[0], strict=True):
                row[i] = c / len(members)
        columns = {"run": [str(run + 1) for run in runs]}
        return Learned(coefficients=Coefficients((tuple(row),)), columns=columns)

    def stages(self, n: int, losses: Losses | None, scored_on: Split) -> Sequence[Stage]:
        """See `Strategy.stages`."""
        return ()

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        return self.average(objective.runs)


def curvature_stages(n: int, batches: int, verifying: Stage, moves: int) -> Sequence[Stage]:
    """Return the stages of a solver on a quadratic: a pass with derivatives along the candidates, then scores.

    The gradients by folds are taken at most ``moves`` times over all ``batches``, with a backward pass for each fold
    that has a part of a batch.
    """
    curvature = Stage("measuring the curvature", forward=batches * (1 + n), backward=batches)
    parts = batches * -(-FOLDS // max(batches, 1))
    return curvature, verifying._replace(forward=moves * batches, backward=moves * parts)


def check_losses(losses: Sequence[float], batches: int, split: Split, *, first: int = 0, samples: int = 1) -> None:
    """Raise TaskError if a loss is NaN or infinite: coefficients trained on it are worthless.

    Args:
        losses: the losses of consecutive steps.
        batches: the number of batches in a pass over the split.
        split: the split they were computed on.
        first: the index of the first step, from 0.
        samples: batches per step.
    """
    for step, loss in enumerate(losses, first):
        if not math.isfinite(loss):
            numbers = sorted({(step * samples + i) % batches + 1 for i in range(samples)})
            where = f"batch{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} of the {split} data"
            hint = f"look for broken examples in the {split} data, or choose a smaller --lr"
            raise TaskError(f"the loss is {loss} at step {step + 1} of the search, on {where}", hint=hint)


def check_number(k: int | Literal["auto"], n: int, which: str = "given") -> None:
    """Raise UsageError if ``--k`` asks for more than the ``n`` candidates."""
    if k != "auto" and k > n:
        hint = f"choose --k {n} or less, or widen the window (--window, --last, --start, --stop, --every)"
        raise TooFewError(f"--k {k} asks for more checkpoints than the {counted(n, 'candidate')} {which}", hint=hint)


def check_split(on: Split | None, splits: Collection[Split]) -> None:
    """Raise UsageError if ``--on`` names data that the task does not have."""
    if on is not None and splits and on not in splits:
        raise UsageError(
            f"--on {on} needs {on} data, but the task has none", hint=f"add a {on}_dataloader(), or --{on} beside --val"
        )


BY_RUN: Final = "Average each run by itself, and these averages equally."
SCORED_ALONE: Final = Stage("scoring candidates", singles=True)


def scored_alone(objective: Objective) -> list[float]:
    """Return the score of each single candidate; larger is better."""
    one_hot = Coefficients.singles(objective.n)
    objective.prefetch(one_hot)
    scores: list[float] = []
    for i, coefficients in enumerate(one_hot):
        scores.append(objective.score(coefficients).value)
        objective.progress(SCORED_ALONE.name, i + 1, objective.n)
    return scores
