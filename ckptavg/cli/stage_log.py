"""Progress in a log: a line at the start and the end of each stage that takes a second, and few between."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from ckptavg.runtime.estimate import about, time_left
from ckptavg.runtime.progress import RESULT

_SHORT: Final = 1.0  # seconds; a stage that takes less has no line
_EVERY: Final = 30.0  # seconds between lines of running stages, and of a stage that was run before to have one again


@dataclass
class _Stage:
    start: float
    last: float
    done: int
    total: int
    shown: bool = False


class StageLog:
    """Progress callback that prints whole lines.

    A stage is announced once it has run for a second, and its end has the time it took. Between these there is one line
    in 30 s, of whichever stage reports, with the time left. A stage that runs again, such as the score of the next
    candidate, is silent unless it takes 30 s. The clock of a stage starts at the end of what was reported before.

    Args:
        show: prints a line.
        clock: returns seconds.
    """

    def __init__(self, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show, clock
        self._running: dict[str, _Stage] = {}
        self._named: set[str] = set()
        self._over = ""
        self._reported = self._line = clock()

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Report ``done`` of ``total``; with a total of 0 ``stage`` is a message."""
        now = self._clock()
        if stage.endswith(RESULT):
            self._finished(stage.removesuffix(RESULT), figures)
        elif not total:
            self._show(stage)
        elif done < total or stage in self._running or stage != self._over:  # later work repeats the last report
            running = self._running.setdefault(stage, _Stage(self._reported, now, done, total))
            running.last, running.done, running.total = now, done, total
            took = now - running.start
            if done == total:
                del self._running[stage]
                self._over = stage
                self._ended(stage, running, took)
            elif took >= _SHORT:
                self._continued(stage, running, now, time_left(figures))
        self._reported = now

    def close(self) -> None:
        """Print how far the stages came that have not reached their end: searches stop where nothing improves."""
        for stage, running in self._running.items():
            if running.shown:
                took = duration(running.last - running.start)
                self._show(f"{stage} ended at {running.done:,}/{running.total:,}, took {took}")
        self._running.clear()

    def _ended(self, stage: str, running: _Stage, took: float) -> None:
        if running.shown or took >= (_EVERY if stage in self._named else _SHORT):
            self._named.add(stage)
            self._show(f"{stage} {running.total:,}/{running.total:,}, took {duration(took)}")

    def _continued(self, stage: str, running: _Stage, now: float, left: str) -> None:
        first = stage not in self._named
        if first or now - self._line >= _EVERY:
            self._named.add(stage)
            running.shown, self._line = running.shown or first, now
            self._show(f"{stage} {running.done:,}/{running.total:,}, {left}")

    def _finished(self, strategy: str, figures: Mapping[str, float]) -> None:
        if (seconds := figures.get("s", 0.0)) >= _SHORT:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "s")
            self._show(f"{strategy} finished: {shown}, took {duration(seconds)}")


def duration(seconds: float) -> str:
    """Return a duration that was measured."""
    return f"{seconds:.1f} s" if seconds < 90 else about(seconds).removeprefix("about ")
