"""Means over seeds with their 95 % intervals.

Seeds differ in initial weights, order of the batches, split of the data and its noise, so an interval is about another
training of the same kind, not about other examples for this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student


@dataclass(frozen=True, kw_only=True)
class Interval:
    """mean ± half, half being t₀.₉₇₅(S − 1)·s/√S over S seeds; None for a single one."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of these values, one a seed."""
        count = len(values)
        if count < 2:
            return cls(mean=fmean(values), half=None, count=count)
        half = float(student.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)
        return cls(mean=fmean(values), half=half, count=count)

    @property
    def sign(self) -> int:
        """1 or −1 where the interval lies on one side of zero, otherwise 0, as always for fewer than three seeds.

        An accuracy is a number of examples, so that two seeds may well differ by the very same, and it would say
        nothing.
        """
        if self.half is None or self.count < 3 or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1

    def __format__(self, spec: str) -> str:
        """``+1.20 ± 0.30``, bold where zero is outside."""
        if self.half is None:
            return f"{self.mean:+{spec}}"
        text = f"{self.mean:+{spec}} ± {self.half:{spec}}"
        return f"**{text}**" if self.sign else text
