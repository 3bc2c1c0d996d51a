"""What is done to a run from inside: a system call fails or is the last one, acknowledgements are noted, a start waits.

The calls are those that the modules below make on ``os``, counted as they come. ``KILL`` ends the process before the
call, ``TORN`` after half of what it was to write, ``TERM`` sends that signal before it, ``SHORT`` lets a write do half
of it, as a system may, and an error's name is the error that the call gives.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

MODULES: Final = (
    "filesystem.atomic", "filesystem.lock", "journal", "output.destination", "output.safetensors_file",
)  # fmt: skip
CALLS: Final = (
    "open", "close", "write", "pwrite", "preadv", "pread", "posix_fallocate", "ftruncate", "fsync", "fdatasync",
    "fstat", "fchmod", "link", "replace", "rename", "unlink",
)  # fmt: skip


@contextmanager
def installed(hook: Mapping[str, Any]) -> Generator[None]:
    """Do to this process what ``hook`` says.

    Keys: ``fault`` (a call's number from 1 on, and what happens there), ``modules`` (whose calls count), ``calls`` (a
    file that gets how many there were), ``acknowledged`` (a file that gets the key of each record that the journal says
    is written), ``every`` (seconds between parts of an evaluation that are kept), ``gate`` (a file that is waited for),
    ``threads`` (torch's), ``listing`` (the seed of the order in which directories are listed), ``largest`` (bytes that
    a file may have).
    """
    import torch

    import ckptavg.journal.pass_progress
    import ckptavg.objective.measurements

    if "every" in hook:
        ckptavg.journal.pass_progress.EVERY = ckptavg.objective.measurements._FLUSH_INTERVAL = hook["every"]  # pyright: ignore
    if "threads" in hook:
        torch.set_num_threads(hook["threads"])
    if "listing" in hook:
        _shuffle(random.Random(hook["listing"]))
    if "largest" in hook:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hook["largest"], hook["largest"]))
    if "acknowledged" in hook:
        _note(hook["acknowledged"])
    faulty = FaultyOS(*hook.get("fault", (0, "")))
    for name in hook.get("modules", MODULES) if {"fault", "calls"} & hook.keys() else ():
        module: Any = __import__(f"ckptavg.{name}", fromlist=["os"])
        module.os = faulty
    while "gate" in hook and not Path(hook["gate"]).exists():
        time.sleep(0.001)
    try:
        yield
    finally:
        if "calls" in hook:
            Path(hook["calls"]).write_text(f"{faulty.count}\n" + "\n".join(faulty.names))


class FaultyOS:
    """``os`` with one fault; everything else is the real thing."""

    def __init__(self, at: int, what: str) -> None:
        self.count = 0
        self.names: list[str] = []
        self._at = at
        self._what = what

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(name, real) if name in CALLS else real

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.names.append(name)
            if self.count != self._at:
                return real(*args, **kwargs)
            if self._what in ("TORN", "SHORT") and name in ("write", "pwrite"):
                fd, data, *rest = args
                done = real(fd, data[: len(data) // 2], *rest)
                if self._what == "SHORT":
                    return done
            if self._what in ("KILL", "TORN"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self._what == "TERM":
                os.kill(os.getpid(), signal.SIGTERM)
            if number := getattr(errno, self._what, None):
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return call


def _shuffle(rng: random.Random) -> None:
    real: Any = os.scandir

    def scandir(path: Any = ".") -> Any:
        with real(path) as found:
            return _Listing(sorted(found, key=lambda entry: rng.random()))

    os.scandir = scandir
    os.listdir = lambda path=".": [entry.name for entry in scandir(path)]


class _Listing(list[Any]):
    """A list that can be used as `os.scandir`'s iterator is."""

    def __enter__(self) -> _Listing:
        return self

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None: ...


def _note(path: str) -> None:
    from ckptavg.journal import Journal

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    real = Journal.put_all

    def put_all(self: Journal, values: Mapping[str, Any]) -> None:
        real(self, values)
        os.write(fd, "".join(f"{key}\n" for key in values).encode())

    Journal.put_all = put_all
