"""Last: the last candidate, the result without averaging."""

from dataclasses import dataclass

from ckptavg.coefficients import Coefficients
from ckptavg.objective import PlainAverage, Strategy


@dataclass(frozen=True, kw_only=True)
class Last(PlainAverage):
    """Take the last candidate alone."""

    def coefficients(self, n: int) -> Coefficients:
        """See `PlainAverage.coefficients`."""
        return Coefficients.uniform([n - 1], n)


STRATEGY: type[Strategy] = Last
