"""ASWA: go through the candidates in training order and average those that do not lower the score.

Shape suffixes: N = candidates.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import Learned, Losses, Objective, Stage, Strategy
from ckptavg.score import Split


@dataclass(frozen=True, kw_only=True)
class ASWA(Strategy):
    """Accept each candidate into a running average if the validation score does not fall.

    The state is the average w̄ of n candidates and its score v, initially the first candidate. For every further w_i:

    - look ahead: ŵ = (n·w̄ + w_i)/(n + 1), with BatchNorm recomputed, has score v̂;
    - hard update if w_i alone scores above both v̂ and v: w̄ = w_i, n = 1, v = score of w_i;
    - else soft update if v̂ ≥ v: w̄ = ŵ, n = n + 1, v = v̂;
    - else reject w_i.

    The result is 1/n for each candidate in w̄. The average is never scored again: v is stored. With a tolerance t
    the soft update requires v̂ ≥ v − t and v stays the highest score so far, so that tolerated losses do not add up.

    Differences from the authors' code: a rejected checkpoint leaves no trace (their image classification restores an
    alias of the changed weights), v is measured once per epoch instead of twice, and n is 1 after a hard update (their
    knowledge-graph callback drops the average at the next soft update). ``--no-hard-updates`` is the rule of their
    image classification.

    References:
        Demir, Sharma and Ngonga Ngomo 2024, Adaptive Stochastic Weight Averaging, arXiv:2406.19092.
    """

    follows = True
    hard_updates: Annotated[bool, "Restart from a candidate that scores above the average."] = True
    tolerance: Annotated[float, "Accept an average this far below the best score so far."] = 0.0
    early_reject: Annotated[bool, "Stop scoring once the decision is certain; needs the task's metric_bounds."] = False

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise UsageError(f"--tolerance must be at least 0, not {self.tolerance}")

    def check(self, n: int, splits: Collection[Split], *, bounded: bool) -> None:
        """See `Strategy.check`."""
        if self.early_reject and not bounded:
            hint = "set them in the task file, for an accuracy: metric_bounds = (0.0, 1.0)"
            raise UsageError("early rejection needs a metric with known bounds", hint=hint)

    def stages(self, n: int, losses: Losses | None, scored_on: Split) -> Sequence[Stage]:
        """See `Strategy.stages`."""
        singles = self.hard_updates
        return (Stage("walking through the candidates", scores=n - singles, singles=singles),)

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        n = objective.n
        if self.hard_updates and not self.early_reject:
            objective.prefetch(Coefficients.singles(n))
        chosen: Sequence[int] = (0,)
        v = objective.score(Coefficients.uniform(chosen, n)).value
        alone: list[float | None] = [v]
        ahead: list[float | None] = [None]
        decisions = ["start"]
        for i in range(1, n):
            ahead_score, soft = self._above(objective, [*chosen, i], v - self.tolerance, strict=False)
            threshold = max(v, ahead_score) if soft and ahead_score is not None else v
            alone_score, hard = (
                self._above(objective, [i], threshold, strict=True) if self.hard_updates else (None, False)
            )
            if hard and alone_score is not None:
                chosen, v, decision = (i,), alone_score, "hard"
            elif soft:
                chosen, v, decision = (*chosen, i), threshold, "soft"
            else:
                decision = "reject"
            ahead.append(ahead_score)
            alone.append(alone_score)
            decisions.append(decision)
            objective.progress("walking through the candidates", i + 1, n, score=v)
        columns = {"alone": alone, "if added": ahead, "decision": decisions}
        return Learned(coefficients=Coefficients.uniform(chosen, n), columns=columns)

    def _above(
        self, objective: Objective, chosen: Sequence[int], threshold: float, *, strict: bool
    ) -> tuple[float | None, bool]:
        """Return the score of a uniform average (None if stopped early) and whether it is above the threshold."""
        coefficients = Coefficients.uniform(chosen, objective.n)
        if self.early_reject:
            score = objective.score_at_least(coefficients, threshold, strict=strict)
            return (None, False) if score is None else (score.value, True)
        value = objective.score(coefficients).value
        return value, value > threshold if strict else value >= threshold


STRATEGY: type[Strategy] = ASWA
