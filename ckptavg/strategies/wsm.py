"""WSM: coefficients that stand for a decay of the learning rate.

Shape suffixes: N = candidates.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias

from ckptavg.coefficients import Coefficients
from ckptavg.objective import BY_RUN, PlainAverage, Strategy

_Decay: TypeAlias = Literal["linear", "sqrt", "cosine"]
_SHAPES: Final[Mapping[_Decay, Callable[[float], float]]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True, kw_only=True)
class WSM(PlainAverage):
    """Average all candidates as if the learning rate had decayed from the first of them to the last.

    The candidates w_1 … w_N come from a training with a constant learning rate. If the updates after w_i had been
    smaller by the factor f(i/N), f(0) = 1 and f(1) = 0, the training would have ended at Σ β_i w_i with
    β_i = f((i − 1)/N) − f(i/N). f is 1 − x (``linear``, which gives the plain mean), 1 − √x (``sqrt``, under which the
    oldest weighs most) or (1 + cos πx)/2 (``cosine``). Candidates of a training whose learning rate did decay are
    decayed twice.

    References:
        Tian et al. 2025, WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training,
        arXiv:2507.17634, theorem 3.1.
    """

    decay: Annotated[_Decay, "Decay to stand for; the candidates' own learning rate should be constant."] = "sqrt"
    by_run: Annotated[bool, BY_RUN] = False

    def coefficients(self, n: int) -> Coefficients:
        """See `PlainAverage.coefficients`."""
        if self.decay == "linear":
            return Coefficients.uniform(range(n), n)  # 1/N to the last bit
        factors = [_SHAPES[self.decay](i / n) for i in range(n + 1)]
        return Coefficients((tuple(factors[i] - factors[i + 1] for i in range(n)),))


STRATEGY: type[Strategy] = WSM
