"""Paired bootstrap over examples: is the difference of two scores significant?

Shape suffixes: U = units (examples, or batches where the task gives means only), R = resamples.
"""

from typing import Final

import torch
from torch import Tensor

from ckptavg.report.result import Gain
from ckptavg.score import Score

RESAMPLES: Final = 2000
CORPUS_RESAMPLES: Final = 400  # for a metric that is recomputed on each resample
FEWEST: Final = 20  # units: with fewer, the interval is far too narrow
_AT_ONCE: Final = 1 << 22  # draws held in memory


def gain(score: Score, reference: Score, *, seed: int = 0) -> Gain:
    """Return ``score`` − ``reference``, both on the same data, with the percentile interval of the paired bootstrap.

    Units are paired if both scores were measured on the same examples in the same order; otherwise each score is
    resampled on its own. Each resample draws U units with replacement and takes the mean of their differences, weighted
    by the number of examples in a unit; the interval covers the middle 95 % of 2000 resamples. With fewer than 20 units
    there is no interval. A metric that is no mean over examples is recomputed on 400 resamples of the batches.

    References:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; paired over test examples: Koehn 2004,
        Statistical Significance Tests for Machine Translation Evaluation.
    """
    generator = torch.Generator().manual_seed(seed)
    value = score.value - reference.value
    own, other = score.per_example, reference.per_example
    paired = True
    if score.resampled is not None and reference.resampled is not None and score.batches >= FEWEST:
        units = score.batches
        draws = [torch.randint(units, (units,), generator=generator).tolist() for _ in range(CORPUS_RESAMPLES)]
        gains = [score.resampled(drawn) - reference.resampled(drawn) for drawn in draws]
        gains_R = torch.tensor(gains, dtype=torch.float64)
    elif score.resampled is not None or own is None or other is None or len(own.values_U) < FEWEST:
        return Gain(value=value, low=None, high=None, units=0)
    else:
        units = len(own.values_U)
        paired = own.order == other.order and units == len(other.values_U)
        if paired:
            gains_R = _means(own.values_U - other.values_U, own.examples_U, generator)
        else:
            gains_R = _means(own.values_U, own.examples_U, generator)
            gains_R -= _means(other.values_U, other.examples_U, generator)
    low, high = torch.quantile(gains_R, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Gain(value=value, low=low, high=high, units=units, paired=paired)


def _means(values_U: Tensor, weight_U: Tensor, generator: torch.Generator) -> Tensor:
    """Return the weighted means of the resamples, [R]."""
    units = len(values_U)
    step = max(1, _AT_ONCE // units)
    means: list[Tensor] = []
    for done in range(0, RESAMPLES, step):
        drawn_RU = torch.randint(units, (min(step, RESAMPLES - done), units), generator=generator)
        means.append((values_U * weight_U)[drawn_RU].sum(dim=1) / weight_U[drawn_RU].sum(dim=1))
    return torch.cat(means)
