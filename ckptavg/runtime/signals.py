"""What ends a run from outside: a first SIGINT, SIGTERM or SIGUSR1 at the next micro-batch, a second one at once.

A process has one set of signal handlers, so this module has state: the handler that `install` made. In a program that
uses ckptavg from Python, and has handlers of its own, there is none, and nothing here has an effect.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import Final, TypeVar

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, and what schedulers send before they kill
_POLL: Final = 0.1  # seconds between looks while something else is waited for
_handler: Handler | None = None

_T = TypeVar("_T")


class Interruption(BaseException):
    """A signal asked the run to end; no `Exception`, so that code that is not ours passes it on."""


class Handler:
    """Answers the signals.

    Attributes:
        received: the first signal's number, None before it.
        waits: whether a signal waits for the next `check`, or is an `Interruption` wherever it comes.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.waits = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note of the first signal; a second one will kill, also where Python waits for something in C."""
        self.received = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if not self.waits:
            raise Interruption


def install() -> None:
    """Answer the signals from now on; before torch is imported, which takes long, and SIGUSR1 would kill."""
    global _handler
    _handler = Handler()
    for number in SIGNALS:
        signal.signal(number, _handler)


def finish() -> None:
    """Let a first signal change nothing from now on: the run has ended, and only its exit code is left to give.

    A second signal still ends the process at once, for instance one that waits for a thread of the task.
    """
    if _handler is not None:
        _handler.waits = True


def pending() -> bool:
    """Whether a signal has come."""
    return _handler is not None and _handler.received is not None


def check() -> None:
    """Raise `Interruption` if a signal has come: called between micro-batches, and before each read of a file."""
    if pending():
        raise Interruption


@contextmanager
def waiting() -> Generator[None]:
    """Within, a signal waits for the next `check`."""
    with _answered(waits=True):
        yield


@contextmanager
def at_once() -> Generator[None]:
    """Within, a signal is an `Interruption` wherever it comes: for waits that never come to a `check`."""
    with _answered(waits=False):
        check()
        yield


def result(future: Future[_T]) -> _T:
    """What a thread finds, waited for with an eye on signals."""
    while True:
        try:
            return future.result(_POLL)
        except TimeoutError:
            if future.done():  # its own
                return future.result()
            check()


@contextmanager
def _answered(*, waits: bool) -> Generator[None]:
    if _handler is None:
        yield
        return
    handler, before = _handler, _handler.waits
    handler.waits = waits
    try:
        yield
    finally:
        handler.waits = before
