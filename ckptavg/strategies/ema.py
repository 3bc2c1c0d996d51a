"""EMA: an exponential moving average over the candidates."""

from dataclasses import dataclass
from typing import Annotated

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import BY_RUN, PlainAverage, Strategy


@dataclass(frozen=True, kw_only=True)
class EMA(PlainAverage):
    """Average with exponentially decaying weights for older candidates.

    The recursion w̄ ← α·w̄ + (1 − α)·w_i from w̄ = w_1 gives β_1 = α^(N−1), β_i = (1 − α)·α^(N−i) for i > 1,
    which sums to 1. It approximates, on saved checkpoints, the EMA updated at every training step.

    References:
        The recursion of ``torch.optim.swa_utils.get_ema_avg_fn``.
    """

    decay: Annotated[float, "Decay α of the average per candidate."] = 0.9
    by_run: Annotated[bool, BY_RUN] = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UsageError(f"--decay must be at least 0 and less than 1, not {self.decay}")

    def coefficients(self, n: int) -> Coefficients:
        """See `PlainAverage.coefficients`."""
        a = self.decay
        row = (a ** (n - 1), *((1 - a) * a ** (n - i) for i in range(2, n + 1)))
        return Coefficients((row,))


STRATEGY: type[Strategy] = EMA
