"""Hooks inside a run: a system call fails or is the last one, acknowledgements are logged, a start waits.

The hooked calls are those that the modules below make on ``os``, numbered in order. ``KILL`` ends the process before
the call, ``TORN`` after half of a write, ``TERM`` sends that signal before it, ``SHORT`` makes a write partial, which
a system may do, and the name of an error makes the call raise that error.
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
    """Install the hooks given by ``hook`` in this process.

    Keys: ``fault`` (a call's number from 1 on, and its fault), ``modules`` (whose calls count), ``calls`` (a file that
    gets the number of calls), ``acknowledged`` (a file that gets the key of each record that the journal acknowledges),
    ``every`` (seconds between writes of deferred records), ``gate`` (a file to wait for), ``threads`` (torch's),
    ``listing`` (the seed of the order of directory listings), ``largest`` (the maximum size of a file in bytes).
    """
    import torch

    import ckptavg.journal

    if "every" in hook:
        ckptavg.journal._FLUSH_INTERVAL = hook["every"]  # pyright: ignore
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
    """``os`` with one fault; every other call is passed through."""

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
    """A list with the interface of `os.scandir`'s iterator."""

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
