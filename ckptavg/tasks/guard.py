"""Isolation of task code: process-wide settings are restored after each call, and each call has a time limit.

A task file is trusted: it runs with the user's permissions. But settings it makes for itself (working directory,
default dtype, argv) do not apply to ckptavg, and ckptavg keeps its signal handlers.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, NamedTuple

import torch

from ckptavg.errors import UsageError


class TooLongError(BaseException):
    """Time limit of a task call exceeded; not an Exception, so the task's own handlers do not catch it."""


class _Setting(NamedTuple):  # of the process, that task code may change
    get: Callable[[], Any]
    set: Callable[[Any], Any]


def _working_directory() -> str | None:
    with suppress(OSError):  # the directory was removed
        return os.getcwd()  # noqa: PTH109  # a plain string is compared at every call
    return None


# settings that a task keeps for its own calls: compared after every call …
_CHEAP: Final = (
    _Setting(_working_directory, lambda folder: folder and os.chdir(folder)),
    _Setting(torch.get_default_dtype, torch.set_default_dtype),
    _Setting(lambda: sys.argv, partial(setattr, sys, "argv")),
)
# … or, where reading them is slow, only after `thorough` calls (import, model, loaders)
_COSTLY: Final = (_Setting(torch.get_default_device, torch.set_default_device),)
# handlers are always restored, even for the task's own calls
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


class Guard:
    """Boundary between ckptavg and one task's code; the settings at construction are ckptavg's.

    Args:
        seconds: time limit of one call, None for no limit. A call blocked forever in C (a deadlocked collective) is
            not interrupted.
        argv: ``sys.argv`` during task calls: ckptavg's own arguments are not meant for the task.
    Raises:
        UsageError: if a limit is set outside the main thread, the only one that receives signals.
    """

    def __init__(self, seconds: float | None, argv: list[str]) -> None:
        self.seconds = seconds
        self._main = threading.current_thread() is threading.main_thread()
        if seconds is not None and not self._main:
            raise UsageError("a limit on the time of a task needs the main thread, where signals arrive")
        self._own_values = {setting: setting.get() for setting in (*_CHEAP, *_COSTLY)}
        self._task_values: dict[_Setting, Any] = {_CHEAP[-1]: argv}

    @contextmanager
    def inside(self, *, thorough: bool = False) -> Generator[None]:
        """Run task code in this context, with the task's settings and the time limit; TooLongError if it is exceeded.

        ``thorough`` compares all settings afterwards, which takes as long as a small model's loss.
        """
        checked = (*_CHEAP, *_COSTLY) if thorough else (*_CHEAP, *(self._task_values.keys() - set(_CHEAP)))
        handlers = {number: signal.getsignal(number) for number in _SIGNALS} if thorough and self._main else {}
        grad = torch.is_grad_enabled()
        for setting, value in self._task_values.items():
            setting.set(value)
        try:
            with self._time_limit():
                yield
        finally:
            for setting in checked:
                if (value := setting.get()) != self._own_values[setting]:
                    self._task_values[setting] = value
                    setting.set(self._own_values[setting])
                else:
                    self._task_values.pop(setting, None)
            torch.set_grad_enabled(grad)
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)

    @contextmanager
    def _time_limit(self) -> Generator[None]:
        if self.seconds is None:
            yield
            return
        before = signal.signal(signal.SIGALRM, _raise_too_long)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _raise_too_long(*_: object) -> None:
    raise TooLongError
