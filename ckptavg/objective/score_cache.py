"""Cache of a search's scores: measured once, charged on every request, and written to the journal for resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from ckptavg.coefficients import Coefficients
from ckptavg.cost import CostMeter
from ckptavg.objective.measurements import MeasurementLog, score_key
from ckptavg.score import Score, Split
from ckptavg.tasks import Task

Key: TypeAlias = tuple[Coefficients, Split, bool]
"""Key of a score: coefficients, split, and whether it is of the exact average."""


class ScoreCache:
    """Scores by key, measured on a miss.

    Args:
        task: the task, whose metric a score from the journal may need.
        meter: records the cost of each score.
        log: scores of an interrupted run.
    """

    def __init__(self, task: Task, meter: CostMeter, log: MeasurementLog | None) -> None:
        self._task = task
        self._meter = meter
        self._log = log
        self._scores: dict[Key, Score] = {}

    def find(self, key: Key, measure: Callable[[], Score | None], threshold: float | None = None) -> Score | None:
        """Return the score, from ``measure`` on a miss; None, which is not cached, if it is below ``threshold``."""
        if key in self._scores and (threshold is None or self._meter.charged(key)):
            self._meter.charge(key)
            return self._scores[key]
        # with a threshold, a score of this run not yet charged is measured again, to charge the price of stopping early
        if self._recall(key, earlier=threshold is not None):
            return self._scores[key]
        if threshold is not None and self._log is not None and self._log.rejected(_name(key), threshold):
            return None
        priced = key if threshold is None else (*key, threshold)
        with self._meter.pricing(priced):
            score = measure()
        if score is not None:
            self._meter.alias(priced, key)
            self.keep(key, score)
        elif threshold is not None and self._log is not None:
            self._log.keep_rejected(_name(key), threshold)
        return score

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return the keys without a cached or recorded score, without duplicates."""
        return [key for key in dict.fromkeys(keys) if key not in self._scores and not self._recall(key)]

    def keep(self, key: Key, score: Score) -> None:
        """Store a measured score."""
        self._scores[key] = score
        if self._log is not None:
            self._log.keep_score(_name(key), score)

    def _recall(self, key: Key, *, earlier: bool = False) -> bool:
        """Load a score from the journal into the cache; return False if there is none."""
        score = self._log and self._log.score(_name(key), self._task, earlier=earlier)
        if score:
            self._scores[key] = score
        return bool(score)


def _name(key: Key) -> str:
    coefficients, split, exact = key
    return score_key(coefficients, split, exact=exact)
