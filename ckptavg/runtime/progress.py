"""Progress reports of long stages."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Final, SupportsFloat

Watch = Callable[[str, int, int, Mapping[str, float]], None]
"""Progress callback ``(stage, done, total, metrics)``; ``total == 0`` prints a one-line message."""
_INTERVAL: Final = 0.1  # seconds between reports: reading metrics synchronises with the device


class Progress:
    """Reports to a callback at most ten times a second, so that it can be called at every step."""

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = watch
        self._prefix = ""
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int, **metrics: SupportsFloat) -> None:
        """Report that ``done`` of ``total`` steps of a stage are finished; the last one is always reported."""
        now = time.perf_counter()
        if self._watch and (done == total or now - self._last > _INTERVAL):
            self._last = now
            self._watch(self._prefix + stage, done, total, {name: float(value) for name, value in metrics.items()})

    @contextmanager
    def prefixed(self, name: str) -> Generator[None]:
        """Put ``name`` before the stages that are reported in the context."""
        self._prefix = f"{name}: "
        yield
        self._prefix = ""
