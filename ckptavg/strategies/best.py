"""Best: the single candidate with the highest validation score."""

from collections.abc import Sequence
from dataclasses import dataclass

from ckptavg.coefficients import Coefficients
from ckptavg.objective import SCORED_ALONE, Learned, Losses, Objective, Stage, Strategy, scored_alone
from ckptavg.score import Split


@dataclass(frozen=True, kw_only=True)
class Best(Strategy):
    """Take the candidate with the highest validation score; ties go to the later one."""

    def stages(self, n: int, losses: Losses | None, scored_on: Split) -> Sequence[Stage]:
        """See `Strategy.stages`."""
        return (SCORED_ALONE,)

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        scores = scored_alone(objective)
        best = max(range(objective.n), key=lambda i: (scores[i], i))
        return Learned(coefficients=Coefficients.uniform([best], objective.n))


STRATEGY: type[Strategy] = Best
