"""Interval of the difference of two scores: how much of it may be due to the choice of examples?

Shape suffix: U = units (examples; batches where the task gives means only; groups of batches).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ckptavg.report.result import Gain
from ckptavg.score import FEWEST, PerExample, Score

if TYPE_CHECKING:
    from torch import Tensor

_GROUPS: Final = 100  # of batches, for a metric that is recomputed without each of them
_ROUNDING: Final = 2**-20  # of a value in float32 that was computed in another order


def gain(score: Score, reference: Score) -> Gain:
    """Return ``score`` − ``reference`` as `single_gain` does, and the same by each of the other metrics of both."""
    others = {name: single_gain(other, reference.others[name]) for name, other in score.others.items()}
    return replace(single_gain(score, reference), others=others)


def single_gain(score: Score, reference: Score) -> Gain:
    """Return ``score`` − ``reference``, both on the same data, with its 95 % interval where that is reliable.

    The mean m = Σ w d / Σ w of the units' differences d, weighted by their numbers of examples w, has the variance
    s² = U/(U − 1) Σ u² and the third cumulant Σ u³, u = w (d − m) / Σ w. The interval is m ± t s with Student's t; on
    the side of the longer tail it extends to Hall's correction for skewness. It takes O(U) time. Units are paired if
    both scores saw the same examples in the same order. Otherwise the cumulants of both are added, with Welch's degrees
    of freedom.

    The units of a metric that is no mean over examples are its jackknife pseudo-values: it is recomputed without each
    of at most 100 groups of batches.

    There is no interval from fewer than 10 units that differ: from each other, or, if they are not paired, from the
    most common value. A difference of at most 2⁻²⁰ of a unit's value, or of the mean size of all, is rounding.
    `Gain.reason` says so.

    References:
        Welch 1947, Biometrika 34; Hall 1992, On the Removal of Skewness by Transformation, JRSS B 54; Efron and
        Tibshirani 1993, An Introduction to the Bootstrap, chapter 11 (the jackknife). docs/benchmarks.md has the
        coverage of this and other methods.
    """
    import torch

    value = score.value - reference.value
    own, other = _units(score), _units(reference)
    if own is None or other is None or not math.isfinite(value):
        return Gain(value=value, reason="no values per example")
    units = len(own.values_U)
    unit = "examples" if units == score.examples else "batches" if score.resampled is None else "groups of batches"
    paired = own.order == other.order and units == len(other.values_U)
    if paired:
        samples = [(own.values_U - other.values_U, own.examples_U)]
        unlike_U, size_U = samples[0][0], torch.maximum(own.values_U.abs(), other.values_U.abs())
    else:
        samples = [(own.values_U, own.examples_U), (-other.values_U, other.examples_U)]
        both_U = torch.cat([own.values_U, other.values_U])
        unlike_U, size_U = both_U - both_U.mode().values, both_U.abs()
    rounding_U = _ROUNDING * (size_U.clamp(min=float(size_U.mean())) if score.resampled is None else units)
    differing = int((unlike_U.abs() > rounding_U).sum())
    if min(differing, units, len(other.values_U)) < FEWEST:
        reason = (
            f"{differing} of {len(unlike_U):,} {unit} differ"
            if units >= FEWEST
            else f"only {units} of the {FEWEST} {unit} needed"
        )
        return Gain(value=value, units=units, unit=unit, paired=paired, reason=reason)
    below, above = _reach([_cumulants(*sample) for sample in samples])
    return Gain(value=value, low=value - below, high=value + above, units=units, unit=unit, paired=paired)


def _units(score: Score) -> PerExample | None:
    """Return the units whose mean is the score, or pseudo-values of a metric that is recomputed."""
    if score.resampled is None or score.per_example is None:
        return score.per_example
    import torch

    groups = min(score.batches, _GROUPS)
    if groups < FEWEST:
        values_U = torch.zeros(groups, dtype=torch.float64)
    else:
        number = [i * groups // score.batches for i in range(score.batches)]
        without = [score.resampled([i for i, g in enumerate(number) if g != group]) for group in range(groups)]
        values_U = groups * score.value - (groups - 1) * torch.tensor(without, dtype=torch.float64)
    return PerExample(values_U=values_U, examples_U=torch.ones_like(values_U), order=score.per_example.order)


def _cumulants(values_U: Tensor, examples_U: Tensor) -> tuple[float, float, int]:
    """Return variance and third cumulant of the weighted mean, and its degrees of freedom."""
    shares_U = examples_U / examples_U.sum()
    deviations_U = shares_U * (values_U - values_U.dot(shares_U))
    freedom = len(values_U) - 1
    variance = float(deviations_U.square().sum()) * (freedom + 1) / freedom
    return variance, float(deviations_U.pow(3).sum()), freedom


def _reach(cumulants: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Return how far the interval of a sum of independent means extends below and above it."""
    from scipy.special import stdtrit  # a quarter of a second  # pyright: ignore[reportMissingTypeStubs]

    variance = sum(one for one, _, _ in cumulants)
    if variance == 0.0:
        return 0.0, 0.0
    spread = math.sqrt(variance)
    t = float(stdtrit(variance**2 / sum(one**2 / freedom for one, _, freedom in cumulants), 0.975))
    skew = sum(third for _, third, _ in cumulants) / spread**3
    return spread * max(t, _corrected(t, skew)), spread * max(t, _corrected(t, -skew))


def _corrected(t: float, skew: float) -> float:
    """Return x with x + a x²/3 + a² x³/27 + a/6 = t, Hall's transformation of a mean with the skewness a."""
    return t if abs(skew) < 1e-6 else 3 / skew * (math.cbrt(1 + skew * (t - skew / 6)) - 1)
