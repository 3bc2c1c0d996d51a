"""Paired bootstrap over examples: is the difference of two scores significant?

Shape suffixes: U = units (examples, or batches where the task gives means only), R = resamples.
"""

from __future__ import annotations

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
    """Return ``score`` − ``reference`` with the percentile interval of the paired bootstrap.

    Units are paired if both scores were measured on the same examples in the same order; otherwise each score is
    resampled on its own. Each resample draws U units with replacement and takes the mean of their differences, weighted
    by the number of examples in a unit; the interval covers the middle 95 % of 2000 resamples. With fewer than 20 units
    there is no interval.

    Args:
        score: score on some data.
        reference: score on the same data.
        seed: seed of the resampling.
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
    """Resample the same batches for both scores and recompute the metric on each resample."""
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
    """Return the weighted means of the resamples, [R]."""
    units = len(values_U)
    means: list[Tensor] = []
    for done in range(0, RESAMPLES, max(1, _AT_ONCE // units)):
        count = min(max(1, _AT_ONCE // units), RESAMPLES - done)
        drawn_RU = torch.randint(units, (count, units), generator=generator)
        means.append((values_U * weight_U)[drawn_RU].sum(dim=1) / weight_U[drawn_RU].sum(dim=1))
    return torch.cat(means)
