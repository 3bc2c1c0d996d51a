"""Bars and lines of block characters, whose meaning does not depend on colour."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from ckptavg.errors import decimal

_HEIGHTS: Final = "▁▂▃▄▅▆▇█"
_LENGTHS: Final = " ▏▎▍▌▋▊▉█"
_SHORTEST: Final = 8  # columns of a line that shows anything
_FEWEST: Final = 3  # scores


def bars(values: Sequence[float], width: int) -> list[Text]:
    """Return a bar for each value, whose length is |value| on a common scale: negative ones left of a line at zero.

    A value other than 0 has at least the thinnest bar. The bars of negative values end at an eighth, a half or a whole
    column: Unicode has no other blocks that are filled from the right.
    """
    low, high = min(0.0, *values), max(0.0, *values)
    left = min(max(1, round(-low / (high - low) * (width - 1))), width - 2) if low < 0 else 0
    right = width - left - 1 if low < 0 else width
    scale = min(left / -low if low < 0 else math.inf, right / high if high > 0 else math.inf)
    axis = "│" if low < 0 else ""
    drawn: list[Text] = []
    for value in values:
        length = abs(value) * scale if value else 0.0
        if value < 0:
            drawn.append(Text(f"{_leftward(length):>{left}}{axis}", style="magenta"))
        else:
            drawn.append(Text(f"{'':{left}}{axis}{_rightward(length)}", style="cyan"))
    return drawn


def _rightward(length: float) -> str:
    eighths = max(round(8 * length), 1 if length else 0)
    return f"{'█' * (eighths // 8)}{_LENGTHS[eighths % 8]}".rstrip()


def _leftward(length: float) -> str:
    whole, rest = divmod(length, 1.0)
    part = "█" if rest > 0.75 else "▐" if rest > 0.3 else "▕" if rest > 0.06 or not whole else ""
    return part + "█" * int(whole)


def heights(values: Sequence[float | None], low: float, high: float) -> str:
    """Return a block for each value, of which ▁ is ``low`` and █ is ``high``; one that is not finite is a gap."""
    span = (high - low) or 1.0
    return "".join(
        " " if value is None or not math.isfinite(value) else _HEIGHTS[round((value - low) / span * 7)]
        for value in values
    )


@dataclass(frozen=True, kw_only=True)
class Sparkline:
    """One line with the scores of the candidates in training order; empty for fewer than 3 scores.

    Where there are more candidates than columns, each block is the mean of neighbours.

    Attributes:
        name: the figure, such as ``metric`` or ``loss``.
        steps: the candidates' steps.
        values: their figures; None or not finite is a gap.
        best: index of the best one.
        places: decimals.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    best: int
    places: int = 4

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        known = [value for value in self.values if value is not None and math.isfinite(value)]
        if len(known) < _FEWEST or options.ascii_only:
            return
        low, high = min(known), max(known)
        least, greatest = (decimal(value, places=self.places) for value in (low, high))
        before = f"{self.name}, step {self.steps[0]} "
        after = f" {self.steps[-1]}: {least} to {greatest}, best at step {self.steps[self.best]}"
        width = min(options.max_width - len(before) - len(after), len(self.values))
        if width >= min(_SHORTEST, len(self.values)):
            yield Text(f"{before}{heights(binned(self.values, width), low, high)}{after}", no_wrap=True)


def binned(values: Sequence[float | None], width: int) -> list[float | None]:
    """Return the means of ``width`` runs of neighbours of as equal a length as possible, without unknown values."""
    ends = [i * len(values) // width for i in range(width + 1)]
    parts = (values[start:end] for start, end in pairwise(ends))
    known = ([value for value in part if value is not None and math.isfinite(value)] for part in parts)
    return [fmean(part) if part else None for part in known]
