"""ASWA: walk through the candidates in training order, and average only those that do not make it worse.

Shape suffixes: N = candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import Learned, Objective, Strategy


@dataclass(frozen=True, kw_only=True)
class ASWA:
    """Accept each candidate into a running average only if the validation score does not fall.

    The state is the average w̄ of n candidates and its score v; the first candidate starts it. For every further one:

    - look ahead: ŵ = (n·w̄ + w_i)/(n + 1), BatchNorm recomputed, scores v̂;
    - hard update where w_i alone scores above both v̂ and v: w̄ = w_i, n = 1, v its score;
    - else soft update where v̂ ≥ v: w̄ = ŵ, n = n + 1, v = v̂;
    - else it is rejected.

    The answer is 1/n for each candidate in w̄. The average is never scored again: v is remembered. With a tolerance t
    the soft update asks for v̂ ≥ v − t and v stays the highest score so far, so that tolerated losses do not add up.

    What differs from the authors' code: a rejected checkpoint leaves no trace (their image classification restores an
    alias of the changed weights), v is not measured twice an epoch, and after a hard update n is 1 (their
    knowledge-graph callback forgets the average at the next soft update). ``--no-hard-updates`` is the rule of their
    image classification.

    References:
        Demir, Sharma and Ngonga Ngomo 2024, Adaptive Stochastic Weight Averaging, arXiv:2406.19092.
    """

    needs_task: ClassVar[bool] = True

    hard_updates: Annotated[bool, "Restart from a candidate that alone scores above the average."] = True
    tolerance: Annotated[float, "How far below the best score so far an average may fall and still be accepted."] = 0.0
    early_reject: Annotated[
        bool, "Stop a score as soon as no remaining example can change the decision; needs the task's metric_bounds."
    ] = False

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise UsageError(f"--tolerance must be at least 0, not {self.tolerance}")

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        n = objective.n
        if self.hard_updates and not self.early_reject:
            objective.prefetch([Coefficients.uniform([i], n) for i in range(n)])
        chosen: Sequence[int] = (0,)
        v = objective.score(Coefficients.uniform(chosen, n)).value
        own: list[float | None] = [v]
        ahead: list[float | None] = [None]
        decisions = ["start"]
        for i in range(1, n):
            looked, soft = self._above(objective, [*chosen, i], v - self.tolerance, strict=False)
            bar = max(v, looked) if soft and looked is not None else v
            alone, hard = self._above(objective, [i], bar, strict=True) if self.hard_updates else (None, False)
            if hard and alone is not None:
                chosen, v, decision = (i,), alone, "hard"
            elif soft:
                chosen, v, decision = (*chosen, i), bar, "soft"
            else:
                decision = "reject"
            ahead.append(looked)
            own.append(alone)
            decisions.append(decision)
            objective.progress("walking through the candidates", i + 1, n, score=v)
        return Learned(
            coefficients=Coefficients.uniform(chosen, n),
            columns={"alone": own, "ahead": ahead, "decision": decisions},
        )

    def _above(
        self, objective: Objective, chosen: Sequence[int], bar: float, *, strict: bool
    ) -> tuple[float | None, bool]:
        """The score of a uniform average (None where it was stopped early) and whether it clears the bar."""
        coefficients = Coefficients.uniform(chosen, objective.n)
        if self.early_reject:
            score = objective.score_at_least(coefficients, bar, strict=strict)
            return (None, False) if score is None else (score.value, True)
        value = objective.score(coefficients).value
        return value, value > bar if strict else value >= bar


STRATEGY: type[Strategy] = ASWA
