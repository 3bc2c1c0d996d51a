"""SWA: the plain mean of all candidates."""

from dataclasses import dataclass
from typing import Annotated

from ckptavg.coefficients import Coefficients
from ckptavg.objective import BY_RUN, PlainAverage, Strategy


@dataclass(frozen=True, kw_only=True)
class SWA(PlainAverage):
    """Average all candidates, β_i = 1/N.

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, arXiv:1803.05407.
    """

    follows = True
    by_run: Annotated[bool, BY_RUN] = False

    def coefficients(self, n: int) -> Coefficients:
        """See `PlainAverage.coefficients`."""
        return Coefficients.uniform(range(n), n)


STRATEGY: type[Strategy] = SWA
