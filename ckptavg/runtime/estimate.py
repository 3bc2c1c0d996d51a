"""Time that the rest of a run takes, from the stages it plans and the host's clock."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

BRIEF: Final = 5.0  # seconds; of a shorter run nothing is said
LEFT: Final = frozenset({"left", "stage_left"})  # figures of a report: seconds left of the run, or of its stage
_WARM_UP: Final = 2.0  # seconds of work before an estimate
_BACKWARD: Final = 2  # units of work of a backward batch, in forward batches


class Stage(NamedTuple):
    """A stage of a run, named as in its progress reports, with the most that it takes.

    ``scores`` and ``tests`` are scores of mixtures on the scored split and on test data, ``singles`` is whether every
    single candidate is scored besides, and ``forward`` and ``backward`` are batches besides those of scores.
    """

    name: str
    scores: int = 0
    tests: int = 0
    singles: bool = False
    forward: int = 0
    backward: int = 0

    @property
    def units(self) -> int:
        """Work in forward batches."""
        return self.forward + _BACKWARD * self.backward


class Estimate:
    """Seconds left of a plan.

    The seconds of a unit of work are those of all planned work so far, without stages that are not planned. Work that
    an interrupted run has done counts as finished and takes no time. The clock is the host's, over many batches: the
    device is not waited for.

    Args:
        plan: returns the stages in order, their scores converted to batches; None while that is unknown.
        unit: what a forward batch is called.
        now: the time.
    """

    def __init__(self, plan: Callable[[], Sequence[Stage] | None], unit: str, now: float) -> None:
        self._plan = plan
        self._unit = unit
        self._stage, self._part = "", 0.0
        self._units = self._seconds = 0.0  # measured at reports
        self._batches = self._pending = 0.0  # units since the last report: finished, and perhaps still running
        self._last = self.start = now

    def work(self, units: float) -> None:
        """Count a batch that starts, or its backward pass."""
        self._batches += self._pending
        self._pending = units

    def report(self, name: str, part: float, now: float) -> None:
        """Record that a stage is finished up to this ``part``."""
        stages = {stage.name: stage.units for stage in self._plan() or ()}
        names = list(stages)
        if name in stages and (self._stage not in stages or names.index(self._stage) <= names.index(name)):
            before = self._part if name == self._stage else 0.0
            if self._pending and part > before:
                self._units += stages[name] * (part - before)
                self._seconds += now - self._last
            self._stage, self._part = name, max(part, before)
        self._last, self._batches, self._pending = now, 0.0, 0.0

    def left(self, now: float) -> float | None:
        """Return the seconds left; None before enough is measured."""
        stages = self._plan()
        units, seconds = self._units + self._batches, self._seconds + (now - self._last if self._batches else 0.0)
        if stages is None or not units or seconds < _WARM_UP:
            return None
        names = [stage.name for stage in stages]
        rest = sum(stage.units for stage in stages)
        if self._stage in names:
            current = names.index(self._stage)
            rest -= sum(stage.units for stage in stages[:current]) + self._part * stages[current].units
        return max(0.0, rest - self._batches) * seconds / units

    def summary(self, seconds: float) -> str:
        """Return one line for the whole plan, which takes this long."""
        stages = self._plan() or ()
        counts = [sum(stage.forward for stage in stages), sum(stage.backward for stage in stages)]
        forward, backward = (f"{round(float(f'{count:.2g}')):,}" for count in counts)
        if self._unit != "forward":
            return f"about {forward} {self._unit}, {about(seconds)}"
        return f"about {forward} forward {f'and {backward} backward ' if counts[1] else ''}batches, {about(seconds)}"


def about(seconds: float) -> str:
    """Return a duration in words, to two digits."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def time_left(figures: Mapping[str, float]) -> str:
    """Return the time left that the figures of a progress report give, in words."""
    if "left" in figures:
        return f"{about(figures['left'])} left"
    return f"{about(figures['stage_left'])} left in this stage" if "stage_left" in figures else "time left unknown"
