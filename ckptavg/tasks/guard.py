"""What a task's code does to the process that it runs in, undone whenever it is left, and how long it may take.

A task file is trusted: it runs as the user's own. But what it sets for itself (a directory, a default dtype, argv) is
not set for ckptavg, and ckptavg keeps its signals.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

import torch

from ckptavg.errors import UsageError


class TooLongError(BaseException):
    """The time for a call of the task is over; no Exception, for the task's own handlers are not meant."""


class _Setting(NamedTuple):
    """Something of the process that a task may want otherwise."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]


def _directory() -> str | None:
    with suppress(OSError):  # it was removed
        return os.getcwd()  # noqa: PTH109  # a plain string is compared at every call
    return None


def _enter(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _set_argv(words: list[str]) -> None:
    sys.argv = words


def _signal(number: signal.Signals) -> _Setting:
    return _Setting(lambda: signal.getsignal(number), lambda handler: signal.signal(number, handler))


# what stays as the task has set it for its own code: looked at after every call …
_CHEAP: Final = (
    _Setting(_directory, _enter),
    _Setting(torch.get_default_dtype, torch.set_default_dtype),
    _Setting(lambda: sys.argv, _set_argv),
)
# … and where looking takes longer, after those that set things up
_COSTLY: Final = (_Setting(torch.get_default_device, torch.set_default_device),)
# what does not
_OURS: Final = tuple(map(_signal, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)))


class Guard:
    """The boundary between ckptavg and one task's code; what it finds set when it is made is ckptavg's.

    Args:
        seconds: that one call may take, None for as long as it wants. A call that waits in C for ever (a deadlocked
            collective) is not interrupted.
        argv: what ``sys.argv`` is for the task: ckptavg's own words are no arguments for it.
    Raises:
        UsageError: if there is a limit in a thread that no signal reaches.
    """

    def __init__(self, seconds: float | None, argv: list[str]) -> None:
        self.seconds = seconds
        self._main = threading.current_thread() is threading.main_thread()
        if seconds is not None and not self._main:
            raise UsageError("a limit on the time of a task needs the main thread, where signals arrive")
        self._ours = {setting: setting.get() for setting in (*_CHEAP, *_COSTLY)}
        self._theirs: dict[_Setting, Any] = {_CHEAP[-1]: argv}

    @contextmanager
    def inside(self, *, thorough: bool = False) -> Generator[None]:
        """The task's code runs within.

        Args:
            thorough: look at everything afterwards, which takes as long as a small model's loss.
        Raises:
            TooLongError: when the time is over.
        """
        looked = (*_CHEAP, *_COSTLY) if thorough else (*_CHEAP, *(self._theirs.keys() - set(_CHEAP)))
        kept = [(setting, setting.get()) for setting in (_OURS if thorough and self._main else ())]
        grad = torch.is_grad_enabled()
        for setting, value in self._theirs.items():
            setting.set(value)
        try:
            with self._limited():
                yield
        finally:
            for setting in looked:
                if (value := setting.get()) != self._ours[setting]:
                    self._theirs[setting] = value
                    setting.set(self._ours[setting])
                else:
                    self._theirs.pop(setting, None)
            torch.set_grad_enabled(grad)
            for setting, value in kept:
                if value is not None and setting.get() is not value:
                    setting.set(value)

    @contextmanager
    def _limited(self) -> Generator[None]:
        if self.seconds is None:
            yield
            return
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _too_long(*_: object) -> None:
    raise TooLongError
