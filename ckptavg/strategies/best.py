"""Best: the single candidate with the highest validation score."""

from dataclasses import dataclass

from ckptavg.coefficients import Coefficients
from ckptavg.objective import Learned, Objective, Strategy, scored_alone


@dataclass(frozen=True, kw_only=True)
class Best(Strategy):
    """Take the candidate with the highest validation score; ties go to the later one."""

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        scores = scored_alone(objective)
        best = max(range(objective.n), key=lambda i: (scores[i], i))
        return Learned(coefficients=Coefficients.uniform([best], objective.n))


STRATEGY: type[Strategy] = Best
