"""Digits: how many decimals of a number its noise allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Final

from ckptavg.errors import decimal
from ckptavg.score import Score

if TYPE_CHECKING:
    from ckptavg.report.result import Gain

ERROR: Final = "± std. error"
"""The name of the row below a table that has the typical standard error of each column."""
_UNKNOWN: Final = 4  # decimals of numbers whose error is unknown
_MOST: Final = 8


def places(errors: Iterable[float], values: Iterable[float | None] = ()) -> int:
    """Return the decimals of ``values``, whose standard errors are ``errors``: 0.9475 ± 0.0112 becomes 0.948 ± 0.011.

    The rule is the Particle Data Group's, for the median error: it keeps two significant digits if its first three are
    100 to 354, and one if they are 355 to 949; from 950 on it is rounded up to 1000 and keeps two. Rows are compared
    with each other, and the error of a difference over the same examples may be much smaller than that of each value:
    there is one decimal more, up to four, as long as at most half of the different values would look different. Numbers
    whose errors are all unknown, which are 0 or infinite, have four.

    References:
        Particle Data Group, Review of Particle Physics, Introduction, section 5.3, Rounding.
    """
    typical = typical_error(errors)
    if typical is None:
        return _UNKNOWN
    first, exponent = _scientific(typical, 2)
    digits = _clamped((1 if first <= 3.54 else 0) - exponent)
    different = {value for value in values if value is not None and math.isfinite(value)}
    while digits < _UNKNOWN and 2 * len({f"{value:.{digits}f}" for value in different}) <= len(different) > 1:
        digits += 1
    return digits


def _scientific(value: float, decimals: int) -> tuple[float, int]:
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    return float(mantissa), int(exponent)


def _clamped(digits: int) -> int:
    return min(max(0, digits), _MOST)


def typical_error(errors: Iterable[float]) -> float | None:
    """Return the median of the known errors; None if there is none."""
    return median(known) if (known := [error for error in errors if 0 < error < math.inf]) else None


def gain_places(gains: Iterable[Gain]) -> int:
    """Return the decimals of differences; see `interval_places`."""
    return interval_places([(gain.low, gain.high) for gain in gains if gain.low is not None and gain.high is not None])


def interval_places(intervals: Sequence[tuple[float, float]]) -> int:
    """Return the decimals of intervals of differences: two significant digits of half the width of the median one.

    There are up to two more where an end of an interval that excludes zero would look like zero. Without an interval
    there are four.
    """
    half = typical_error((high - low) / 2 for low, high in intervals)
    digits = _UNKNOWN if half is None else _clamped(1 - _scientific(half, 1)[1])
    ends = [min(abs(low), abs(high)) for low, high in intervals if low > 0 or high < 0]
    return next((d for d in (digits, digits + 1) if all(round(end, d) for end in ends)), digits + 2)


def figure_places(scores: Iterable[Score | None], name: str) -> int:
    """Return the decimals of the figure ``name`` of scores that are compared with each other."""
    known = [score for score in scores if score is not None and name in score.figures]
    return places((score.errors[name] for score in known), (score.figures[name] for score in known))


def figure_column(scores: Sequence[Score | None], name: str) -> tuple[list[str], str]:
    """Return the cells of a column with the figure ``name``, and ± its typical standard error; unknown ones are ""."""
    digits = figure_places(scores, name)
    error = typical_error(score.errors[name] for score in scores if score is not None and name in score.figures)
    cells = ["" if score is None else decimal(score.figures.get(name), places=digits) for score in scores]
    return cells, "" if error is None else f"±{decimal(error, places=digits)}"


def figure_texts(scores: Sequence[Score], name: str) -> list[str]:
    """Return the figure ``name`` of scores that a sentence compares, with as many decimals each."""
    return figure_column(scores, name)[0]
