"""Last: the last candidate, the result without averaging."""

from dataclasses import dataclass
from typing import ClassVar

from ckptavg.coefficients import Coefficients
from ckptavg.objective import Learned, Objective, Strategy


@dataclass(frozen=True, kw_only=True)
class Last:
    """Take the last candidate alone."""

    needs_task: ClassVar[bool] = False

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        return Learned(coefficients=Coefficients.uniform([objective.n - 1], objective.n))


STRATEGY: type[Strategy] = Last
