"""Whether one score is really better than another: the paired bootstrap over examples.

Shape suffixes: U = units (examples, or batches where the task gives means only), R = resamples.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ckptavg.report.result import Gain
from ckptavg.score import Score

RESAMPLES: Final = 2000
CORPUS_RESAMPLES: Final = 400  # of a metric that is computed anew for each
FEWEST: Final = 20  # units: an interval from fewer is far too narrow
_AT_ONCE: Final = 1 << 22  # draws held in memory


def gain(score: Score, reference: Score, *, seed: int = 0) -> Gain:
    """How much larger ``score`` is than ``reference``, with the percentile interval of the paired bootstrap.

    The units of both were measured on the same examples in the same order (else both are resampled by themselves and
    nothing is paired). Each resample draws U units with
    replacement and takes the mean of their differences, weighted by the examples a unit stands for; the interval
    holds the middle 95 % of 2000 of them. With fewer than 20 units there is no interval.

    Args:
        score: on some data.
        reference: on the same data.
        seed: of the resampling.
    References:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; paired over test examples: Koehn 2004,
        Statistical Significance Tests for Machine Translation Evaluation.
    """
    if score.resampled is not None and reference.resampled is not None and score.batches >= FEWEST:
        return _corpus_gain(score, reference, seed)
    if (
        score.resampled is not None
        or score.per_example is None
        or reference.per_example is None
        or len(score.per_example.values_U) < FEWEST
    ):
        return Gain(value=score.value - reference.value, low=None, high=None, units=0)
    generator = torch.Generator().manual_seed(seed)
    paired = score.per_example.order == reference.per_example.order and len(score.per_example.values_U) == len(
        reference.per_example.values_U
    )
    if paired:
        weight_U = score.per_example.examples_U
        means_R = _means(score.per_example.values_U - reference.per_example.values_U, weight_U, generator)
    else:
        means_R = _means(score.per_example.values_U, score.per_example.examples_U, generator)
        means_R -= _means(reference.per_example.values_U, reference.per_example.examples_U, generator)
    low, high = torch.quantile(means_R, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    units = len(score.per_example.values_U)
    return Gain(value=score.value - reference.value, low=low, high=high, units=units, paired=paired)


def _corpus_gain(score: Score, reference: Score, seed: int) -> Gain:
    """The same batches drawn for both, and the metric of each draw computed anew."""
    assert score.resampled is not None and reference.resampled is not None
    generator = torch.Generator().manual_seed(seed)
    gains: list[float] = []
    for _ in range(CORPUS_RESAMPLES):
        drawn: list[int] = torch.randint(score.batches, (score.batches,), generator=generator).tolist()
        gains.append(score.resampled(drawn) - reference.resampled(drawn))
    bounds = torch.quantile(torch.tensor(gains, dtype=torch.float64), torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = bounds.tolist()
    return Gain(value=score.value - reference.value, low=low, high=high, units=score.batches)


def _means(values_U: Tensor, weight_U: Tensor, generator: torch.Generator) -> Tensor:
    """[R], the weighted means of resamples."""
    units = len(values_U)
    means: list[Tensor] = []
    for done in range(0, RESAMPLES, max(1, _AT_ONCE // units)):
        count = min(max(1, _AT_ONCE // units), RESAMPLES - done)
        drawn_RU = torch.randint(units, (count, units), generator=generator)
        means.append((values_U * weight_U)[drawn_RU].sum(dim=1) / weight_U[drawn_RU].sum(dim=1))
    return torch.cat(means)
