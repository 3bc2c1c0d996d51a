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

    The median error keeps two significant digits, at most what the GUM calls usual. The Particle Data Group drops the
    second one where the first two are 36 to 94; it is kept here, because rows are compared with each other, and the
    error of their difference over the same examples is often smaller than that of each. There is one decimal more, up
    to four, as long as at most half of the different values would look different. Numbers whose errors are all unknown,
    which are 0 or infinite, have four.

    References:
        JCGM 100:2008, Guide to the Expression of Uncertainty in Measurement, 7.2.6; Particle Data Group, Review of
        Particle Physics, Introduction, Rounding.
    """
    typical = typical_error(errors)
    if typical is None:
        return _UNKNOWN
    exponent = math.floor(math.log10(float(f"{typical:.1e}")))  # 0.0996 is 0.10
    digits = min(max(0, 1 - exponent), _MOST)
    different = {value for value in values if value is not None and math.isfinite(value)}
    while digits < _UNKNOWN and 2 * len({f"{value:.{digits}f}" for value in different}) <= len(different) > 1:
        digits += 1
    return digits


def typical_error(errors: Iterable[float]) -> float | None:
    """Return the median of the known errors; None if there is none."""
    return median(known) if (known := [error for error in errors if 0 < error < math.inf]) else None


def gain_places(gains: Iterable[Gain]) -> int:
    """Return the decimals of differences: two significant digits of half their intervals' width, by `places`.

    There are up to two more where an end of an interval that excludes zero would look like zero.
    """
    intervals = [(gain.low, gain.high) for gain in gains if gain.low is not None and gain.high is not None]
    digits = places((high - low) / 2 for low, high in intervals)
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
