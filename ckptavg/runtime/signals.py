"""Signal handling: the first SIGINT, SIGTERM or SIGUSR1 ends the run at the next micro-batch, a second one at once.

Signal handlers are global to a process, so this module has one handler. Programs that import ckptavg keep their own:
`install` is not called, so no signal ever reaches it.
"""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from ckptavg.errors import CkptavgError

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; schedulers send the others before they kill


class Interruption(BaseException):
    """Raised when a signal ends the run; not an `Exception`, so that third-party code does not catch it."""


class Handler:
    """Handler of `SIGNALS`."""

    def __init__(self) -> None:
        self.received: int | None = None  # number of the first signal
        self.waits = False  # defer a signal to the next `check`, instead of raising `Interruption` wherever it arrives

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal and restore the default action, so that a second one kills even inside a C call."""
        self.received = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if not self.waits:
            raise Interruption


_handler = Handler()


def install() -> None:
    """Install the handler; call it before the slow import of torch, during which SIGUSR1 would kill the process."""
    global _handler
    _handler = Handler()
    _arm()


def _arm() -> None:
    for number in SIGNALS:
        signal.signal(number, _handler)


def finish() -> None:
    """Ignore a first signal from now on, as only the exit code is left to return; a second one still kills at once."""
    _handler.waits = True


def pending() -> bool:
    """Return whether a signal has arrived."""
    return _handler.received is not None


def check() -> None:
    """Raise `Interruption` if a signal has arrived; called between micro-batches and before each read of a file."""
    if pending():
        raise Interruption


def stopped(work: Callable[[], None]) -> bool:
    """Run ``work``, which a first SIGINT ends instead of the run; return whether one arrived.

    A later SIGINT is a first one again. A terminal sends it to the workers of data loaders too, so an error while it is
    pending is taken for its effect.
    """
    try:
        work()
    except (CkptavgError, RuntimeError, Interruption):
        if _handler.received != signal.SIGINT:
            raise
    if _handler.received != signal.SIGINT:
        return False
    _handler.received = None
    _arm()
    return True


@contextmanager
def waiting(*, waits: bool = True) -> Generator[None]:
    """Defer signals to the next `check` within the context."""
    before, _handler.waits = _handler.waits, waits
    try:
        yield
    finally:
        _handler.waits = before


@contextmanager
def at_once() -> Generator[None]:
    """Raise `Interruption` as soon as a signal arrives: for waits that never reach a `check`."""
    with waiting(waits=False):
        check()
        yield
