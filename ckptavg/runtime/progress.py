"""Progress reports of long stages, with the time left."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, SupportsFloat

from ckptavg.runtime.estimate import BRIEF, Estimate, Stage

Watch = Callable[[str, int, int, Mapping[str, float]], None]
"""Progress callback ``(stage, done, total, metrics)``; ``total == 0`` prints a one-line message.

``metrics`` has ``left``, the seconds left of the run, or ``stage_left``, those of the stage, once they are known. The
stage ``NAME: result`` of a comparison has the figures of a strategy that has finished.
"""
RESULT: Final = ": result"  # ending of such a stage
_INTERVAL: Final = 0.1  # seconds between reports: reading metrics synchronises with the device
_UNKNOWN: Final = "how long this takes is unknown"


class Progress:
    """Reports to a callback at most ten times a second, so that it can be called at every step."""

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = watch
        self._prefix = ""
        self._last = 0.0
        self._report: tuple[str, int, int, Mapping[str, SupportsFloat]] | None = None  # the last one
        self._stage = ("", 0, 0.0)  # of the last report: its name, and what was done at which time at its start
        self._estimate: Estimate | None = None
        self._announced, self._planned = True, False

    def expect(self, plan: Callable[[], Sequence[Stage] | None] | None, unit: str = "forward") -> None:
        """Plan the stages of a run; see `ckptavg.runtime.estimate.Estimate`. Without a plan its length is unknown."""
        self._estimate = Estimate(plan or (lambda: None), unit, time.perf_counter())
        self._announced, self._planned = False, plan is not None

    def work(self, units: float) -> None:
        """Count a batch that starts, in forward batches."""
        if self._estimate is None or self._watch is None:
            return
        self._estimate.work(units)
        now = time.perf_counter()
        if now - self._last > _INTERVAL:
            self._last = now
            self._announce(now)
            if self._report is not None:
                self._emit(*self._report, now)

    def __call__(self, stage: str, done: int, total: int, **metrics: SupportsFloat) -> None:
        """Report that ``done`` of ``total`` steps of a stage are finished; the last one is always reported."""
        if self._watch is None:
            return
        now, stage = time.perf_counter(), self._prefix + stage
        if self._estimate is not None and total:
            self._estimate.report(stage, done / total, now)
        if self._stage[0] != stage:
            self._stage = (stage, done, now)
        self._report = (stage, done, total, metrics) if total else self._report  # `work` repeats it
        if done == total or now - self._last > _INTERVAL:
            self._last = now
            self._announce(now)
            self._emit(stage, done, total, metrics, now)

    def _emit(self, stage: str, done: int, total: int, metrics: Mapping[str, SupportsFloat], now: float) -> None:
        figures = {name: float(value) for name, value in metrics.items()}
        left = None if self._estimate is None else self._estimate.left(now)
        _, first, start = self._stage
        if left is not None:
            figures["left"] = left
        elif first < done < total:
            figures["stage_left"] = (now - start) / (done - first) * (total - done)
        if self._watch is not None:
            self._watch(stage, done, total, figures)

    def _announce(self, now: float) -> None:
        """Say once how long the run takes, unless that is brief."""
        if self._announced or self._watch is None or self._estimate is None:
            return
        elapsed, left = now - self._estimate.start, self._estimate.left(now)
        if left is not None and elapsed + left >= BRIEF:
            self._watch(self._estimate.summary(elapsed + left), 0, 0, {})
        elif elapsed >= BRIEF and not self._planned:
            self._watch(_UNKNOWN, 0, 0, {})
        else:
            return
        self._announced = True

    @contextmanager
    def prefixed(self, name: str) -> Generator[None]:
        """Put ``name`` before the stages that are reported in the context."""
        self._prefix = f"{name}: "
        try:
            yield
        finally:
            self._prefix = ""

    def result(self, name: str, figures: Mapping[str, float]) -> None:
        """Report the figures of a strategy that has finished."""
        if self._watch is not None:
            self._watch(f"{name}{RESULT}", 1, 1, figures)
