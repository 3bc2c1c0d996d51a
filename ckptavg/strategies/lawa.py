"""LAWA: the mean of the last K candidates."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import BY_RUN, PlainAverage, Strategy, check_number
from ckptavg.score import Split


@dataclass(frozen=True, kw_only=True)
class LAWA(PlainAverage):
    """Average the last K candidates, β_i = 1/K.

    References:
        Kaddour 2022, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with LAtest Weight Averaging,
        arXiv:2209.14981.
    """

    follows = True
    k: Annotated[int, "Number of checkpoints to average."] = 5
    by_run: Annotated[bool, BY_RUN] = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"--k must be at least 1, not {self.k}")

    def check(self, n: int, splits: Collection[Split], *, bounded: bool) -> None:
        """See `Strategy.check`."""
        check_number(self.k, n, "of the shortest run" if self.by_run else "given")

    def coefficients(self, n: int) -> Coefficients:
        """See `PlainAverage.coefficients`."""
        return Coefficients.uniform(range(n - self.k, n), n)


STRATEGY: type[Strategy] = LAWA
