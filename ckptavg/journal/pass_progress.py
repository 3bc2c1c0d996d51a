"""How far a pass over data has come, kept now and then: an interrupted one goes on in its middle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

from ckptavg.journal.tensor_json import decode, encode
from ckptavg.runtime import signals

EVERY: Final = 20.0  # seconds of measuring that may be lost, and the batch they end in

_T = TypeVar("_T")


class ChangedDataError(Exception):
    """The data are not those that an earlier run has seen: what it measured is of no use."""


def resumed(partial: PassProgress, work: Callable[[], _T]) -> _T:
    """Do ``work``, which goes on from ``partial``; from the beginning where the data have changed since."""
    try:
        return work()
    except ChangedDataError:
        partial.forget()
        return work()


class PassProgress:
    """What is known of one pass.

    Args:
        key: of the pass.
        get: a journal's; the default knows nothing.
        put: a journal's; the default keeps nothing.
    """

    def __init__(
        self,
        key: str = "",
        get: Callable[[str], Any] = lambda key: None,
        put: Callable[[str, Any], None] | None = None,
    ) -> None:
        self._key = key
        self._put = put
        self._kept = time.monotonic()
        self._found: list[dict[str, Any]] = []
        while (found := get(f"{key} {len(self._found)}")) is not None:
            self._found.append(found)

    @property
    def states(self) -> list[Any]:
        """What was kept, in the order it was."""
        return [decode(found["state"]) for found in self._found]

    def forget(self) -> None:
        """Begin anew."""
        for number in range(len(self._found)):
            assert self._put is not None
            self._put(f"{self._key} {number}", None)
        self._found = []

    def remaining(
        self, batches: Iterable[_T], order: Callable[[], int], state: Callable[[], Any], *, whole: bool = False
    ) -> Iterator[_T]:
        """The batches that are still to do; between them, and when a signal ends the run, the state is kept.

        Args:
            batches: all of them, as in the run that was interrupted.
            order: a checksum of those given so far.
            state: what is known of those done so far, or of those since it was last asked for.
            whole: keep what is known at the end too, where it took long enough to be kept before.
        Raises:
            ChangedDataError: if the batches to skip are not those that were done.
        """
        known, expected = (self._found[-1][name] if self._found else 0 for name in ("batches", "order"))
        done = 0
        try:
            for done, batch in enumerate(batches, 1):
                if done > known:
                    yield batch
                elif done == known and order() != expected:
                    raise ChangedDataError
                if done > known and self.should_save():
                    self._keep(done, order, state)
        except signals.Interruption:
            self._keep(done, order, state)
            raise
        if done < known:
            raise ChangedDataError
        if whole and self._found:
            self._keep(done, order, state)

    def should_save(self) -> bool:
        """Whether it is time to keep what is known."""
        return self._put is not None and time.monotonic() - self._kept >= EVERY

    def keep(self, done: int, state: Any) -> None:
        """Keep what is known where there are no batches to leave out."""
        self._keep(done, int, lambda: state)

    def _keep(self, done: int, order: Callable[[], int], state: Callable[[], Any]) -> None:
        if self._put is None or done <= (self._found[-1]["batches"] if self._found else 0):
            return
        try:
            part = {"batches": done, "order": order(), "state": encode(state())}
        except TypeError:  # of a metric that keeps something else than numbers
            return
        self._put(f"{self._key} {len(self._found)}", part)
        self._found.append(part)
        self._kept = time.monotonic()
