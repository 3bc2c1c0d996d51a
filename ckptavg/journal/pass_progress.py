"""Save the progress of a pass over data at intervals, so that an interrupted pass can be resumed midway."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

from ckptavg.journal.tensor_json import decode, encode
from ckptavg.runtime import signals

EVERY: Final = 20.0  # seconds between saves; an interruption loses at most these and one batch

_T = TypeVar("_T")


class ChangedDataError(Exception):
    """Raised if the data differ from those of the earlier run, which invalidates its partial results."""


def resumed(partial: PassProgress, work: Callable[[], _T]) -> _T:
    """Run ``work``, which resumes from ``partial``; if the data have changed, discard it and start over."""
    try:
        return work()
    except ChangedDataError:
        partial.forget()
        return work()


class PassProgress:
    """Saved progress of one pass.

    Args:
        key: journal key of the pass.
        get: `Journal.get`; by default nothing is found.
        put: `Journal.put`; by default nothing is saved.
    """

    def __init__(
        self,
        key: str = "",
        get: Callable[[str], Any] = lambda key: None,
        put: Callable[[str, Any], None] | None = None,
    ) -> None:
        self._key = key
        self._put = put
        self._last_save = time.monotonic()
        self._saved: list[dict[str, Any]] = []
        while (part := get(f"{key} {len(self._saved)}")) is not None:
            self._saved.append(part)

    @property
    def states(self) -> list[Any]:
        """Saved states, oldest first."""
        return [decode(part["state"]) for part in self._saved]

    def forget(self) -> None:
        """Discard the saved progress."""
        for number in range(len(self._saved)):
            assert self._put is not None
            self._put(f"{self._key} {number}", None)
        self._saved = []

    def remaining(
        self, batches: Iterable[_T], order: Callable[[], int], state: Callable[[], Any], *, whole: bool = False
    ) -> Iterator[_T]:
        """Yield the remaining batches; saves the state at intervals and when a signal interrupts the run.

        Args:
            batches: all batches, as in the interrupted run.
            order: returns a checksum of the batches iterated so far.
            state: returns the state after these batches, or the increment since its last call.
            whole: also save at the end, if progress was saved before.
        Raises:
            ChangedDataError: if the skipped batches differ from those of the interrupted run.
        """
        skipped, expected = (self._saved[-1][name] if self._saved else 0 for name in ("batches", "order"))
        done = 0
        try:
            for done, batch in enumerate(batches, 1):
                if done > skipped:
                    yield batch
                elif done == skipped and order() != expected:
                    raise ChangedDataError
                if done > skipped and self.should_save():
                    self._save(done, order, state)
        except signals.Interruption:
            self._save(done, order, state)
            raise
        if done < skipped:
            raise ChangedDataError
        if whole and self._saved:
            self._save(done, order, state)

    def should_save(self) -> bool:
        """Return True if the interval since the last save has elapsed."""
        return self._put is not None and time.monotonic() - self._last_save >= EVERY

    def keep(self, done: int, state: Any) -> None:
        """Save a state of a pass that has no batches to skip."""
        self._save(done, int, lambda: state)

    def _save(self, done: int, order: Callable[[], int], state: Callable[[], Any]) -> None:
        if self._put is None or done <= (self._saved[-1]["batches"] if self._saved else 0):
            return
        try:
            part = {"batches": done, "order": order(), "state": encode(state())}
        except TypeError:  # the state of a metric is not JSON-serializable
            return
        self._put(f"{self._key} {len(self._saved)}", part)
        self._saved.append(part)
        self._last_save = time.monotonic()
