"""Numbers and names of a report as they are printed on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ckptavg.errors import decimal
from ckptavg.report import json_values
from ckptavg.score import DATA

_NAMES: Mapping[str, str] = {**DATA}
Report = Mapping[str, Any]
"""A report as values of JSON."""


def data(split: str) -> str:
    """Return the name of a split in a sentence."""
    return f"{_NAMES.get(split, split)} data"


def with_noise(value: float | None, noise: float | None) -> str:
    """Return `json_values.with_noise` with a true minus sign."""
    return json_values.with_noise(value, noise).replace("-", "−")


def signed(value: float | None, sign: str = "") -> str:
    """Return a number with four decimals and a true minus sign; an unknown one is empty."""
    return decimal(value, sign).replace("-", "−")


def interval(gain: Mapping[str, Any]) -> str:
    """Return `json_values.difference` with a true minus sign."""
    return json_values.difference(gain).replace("-", "−")


def step(number: int | None) -> str:
    """Return a training step with separators of thousands."""
    return "" if number is None else f"{number:,}"


def steps(numbers: Sequence[int], most: int = 6) -> str:
    """Return training steps: all of a few, else as ``every N from A to B`` or the first ones and the last."""
    ordered = sorted(set(numbers))
    gaps = {after - before for before, after in pairwise(ordered)}
    if len(ordered) > 3 and len(gaps) == 1:
        gap = gaps.pop()
        return f"{step(ordered[0])} to {step(ordered[-1])}" + (f", every {step(gap)}" if gap > 1 else "")
    if len(ordered) > most:
        ordered_text = ", ".join(map(step, ordered[: most - 1]))
        return f"{ordered_text}, … {step(ordered[-1])}"
    return ", ".join(map(step, ordered))


def cell(value: Any) -> str:
    """Return a value of a table: a number to four decimals, a text as it is, nothing for null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    return signed(value) if isinstance(value, float) else "" if value is None else str(value)


def seconds(spent: Mapping[str, Any]) -> str:
    """Return the time of a cost, which may be unknown."""
    return "" if spent["seconds"] is None else f"{spent['seconds']:,.1f} s"
