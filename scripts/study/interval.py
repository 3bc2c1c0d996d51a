"""Means over seeds with their 95 % intervals.

A seed determines initial weights, order of batches, split of the data and its noise, so an interval covers another
training of the same kind, not other examples for the same training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

from scipy.stats import t as student

FEWEST: Final = 3  # seeds for a sign


@dataclass(frozen=True, kw_only=True)
class Interval:
    """mean ± half, with half = t₀.₉₇₅(S − 1)·s/√S over S seeds; None for a single seed."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of these values, one per seed."""
        count = len(values)
        if count < 2:
            return cls(mean=fmean(values), half=None, count=count)
        half = float(student.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)
        return cls(mean=fmean(values), half=half, count=count)

    @property
    def sign(self) -> int:
        """Return 1 or −1 if the interval excludes zero, otherwise 0; always 0 for fewer than three seeds.

        An accuracy is a count of examples, so two seeds can differ by exactly the same amount, which would give an
        interval of zero width.
        """
        if self.half is None or self.count < FEWEST or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1

    def __format__(self, spec: str) -> str:
        """Format as ``+1.20 ± 0.30``, bold if the interval excludes zero."""
        if self.half is None:
            return f"{self.mean:+{spec}}"
        text = f"{self.mean:+{spec}} ± {self.half:{spec}}"
        return f"**{text}**" if self.sign else text
