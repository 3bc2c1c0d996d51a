"""SWA: the plain mean of all candidates."""

from dataclasses import dataclass
from typing import ClassVar

from ckptavg.coefficients import Coefficients
from ckptavg.objective import Learned, Objective, Strategy


@dataclass(frozen=True, kw_only=True)
class SWA:
    """Average all candidates, β_i = 1/N.

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, arXiv:1803.05407.
    """

    needs_task: ClassVar[bool] = False

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        return Learned(coefficients=Coefficients.uniform(range(objective.n), objective.n))


STRATEGY: type[Strategy] = SWA
