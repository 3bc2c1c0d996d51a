"""LAWA: the mean of the last K candidates."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import Learned, Objective, Strategy


@dataclass(frozen=True, kw_only=True)
class LAWA:
    """Average the last K candidates, β_i = 1/K.

    References:
        Kaddour 2022, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with LAtest Weight Averaging,
        arXiv:2209.14981.
    """

    needs_task: ClassVar[bool] = False

    k: Annotated[int, "Number of checkpoints to average."] = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"--k must be at least 1, not {self.k}")

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        n = objective.n
        if self.k > n:
            raise UsageError(f"--k {self.k} asks for more checkpoints than the {n} candidates there are")
        return Learned(coefficients=Coefficients.uniform(range(n - self.k, n), n))


STRATEGY: type[Strategy] = LAWA
