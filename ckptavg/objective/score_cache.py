"""The scores of a search: measured once, charged whenever they are asked for, and kept for a run that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from ckptavg.coefficients import Coefficients
from ckptavg.cost import CostMeter
from ckptavg.objective.measurements import MeasurementLog, score_key
from ckptavg.score import Score, Split
from ckptavg.tasks import Task

Key: TypeAlias = tuple[Coefficients, Split, bool]
"""Of a score: which mixture, on which data, and whether of the exact average."""


class ScoreCache:
    """What is known of scores.

    Args:
        task: has the metric that a score from the journal may need.
        meter: knows what each has cost.
        replay: knows what an interrupted run has measured.
    """

    def __init__(self, task: Task, meter: CostMeter, replay: MeasurementLog | None) -> None:
        self._task = task
        self._meter = meter
        self._replay = replay
        self._known: dict[Key, Score] = {}

    def find(self, key: Key, measure: Callable[[], Score | None], bar: float | None = None) -> Score | None:
        """The score, by ``measure`` if need be; None, not remembered, where that says it stays below ``bar``."""
        if key in self._known and (bar is None or self._meter.charged(key)):
            self._meter.charge(key)
            return self._known[key]
        # what this run has measured itself is measured again where it is to stop early, for the price of that
        if self._recall(key, earlier=bar is not None):
            return self._known[key]
        if bar is not None and self._replay is not None and self._replay.rejected(_name(key), bar):
            return None
        priced = key if bar is None else (*key, bar)
        with self._meter.pricing(priced):
            score = measure()
        if score is not None:
            self._meter.alias(priced, key)
            self.keep(key, score)
        elif bar is not None and self._replay is not None:
            self._replay.keep_rejected(_name(key), bar)
        return score

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those that nobody has measured yet, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self._known and not self._recall(key)]

    def keep(self, key: Key, score: Score) -> None:
        """Remember what was measured."""
        self._known[key] = score
        if self._replay is not None:
            self._replay.keep_score(_name(key), score)

    def _recall(self, key: Key, *, earlier: bool = False) -> bool:
        """Whether an interrupted run has measured it; it is remembered then."""
        found = self._replay and self._replay.score(_name(key), self._task, earlier=earlier)
        if found:
            self._known[key] = found
        return bool(found)


def _name(key: Key) -> str:
    coefficients, split, exact = key
    return score_key(coefficients, split, exact=exact)
