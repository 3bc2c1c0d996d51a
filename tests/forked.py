"""Run ``ckptavg`` in a child of this process: as another user, in a deleted directory, with streams closed."""

from __future__ import annotations

import io
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from ckptavg.__main__ import main

NOBODY = 65534


def forked(
    *words: object, cwd: Path, prepare: Callable[[], object] = lambda: None, closed: tuple[int, ...] = (),
    user: int | None = None, encoding: str = "utf-8", environment: dict[str, str | None] | None = None,
    stdout: int | None = None, seconds: int = 300,
) -> CompletedProcess[str]:  # fmt: skip
    """Run the command by its entry point; return its exit code (negative for a signal) and its output.

    Args:
        *words: arguments of the command.
        cwd: initial working directory.
        prepare: function called in the child, in ``cwd``, before the command.
        closed: descriptors to close, among 0, 1 and 2.
        user: user id of the process.
        encoding: encoding of stdout and stderr.
        environment: variables to set, or to unset (None).
        stdout: descriptor to use instead of a file.
        seconds: time after which the command counts as hung.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _run(words, cwd, prepare, closed, user, encoding, environment or {}, stdout or out.fileno(), err.fileno(),
                 seconds)  # fmt: skip
        _, status = os.waitpid(child, 0)
        texts: list[str] = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "backslashreplace"))
    return CompletedProcess([*map(str, words)], os.waitstatus_to_exitcode(status), *texts)


def _run(
    words: tuple[object, ...], cwd: Path, prepare: Callable[[], object], closed: tuple[int, ...], user: int | None,
    encoding: str, environment: dict[str, str | None], out: int, err: int, seconds: int,
) -> None:  # fmt: skip
    code = 99
    try:
        signal.alarm(seconds)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, fd in enumerate((null, out, err)):
            os.dup2(fd, number)
        for number in closed:
            os.close(number)
        streams = [None if n in closed else io.TextIOWrapper(io.FileIO(n, "w"), encoding, line_buffering=True)
                   for n in (1, 2)]  # fmt: skip
        sys.stdout, sys.stderr = streams  # type: ignore
        sys.__stdout__, sys.__stderr__ = streams  # type: ignore
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        os.chdir(cwd)
        prepare()
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        sys.argv = ["ckptavg", *map(str, words)]
        main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                try:
                    stream.flush()
                except OSError:
                    code = 120  # same as at the interpreter's own exit
    except BaseException as error:
        os.write(2, f"left by {type(error).__name__}: {error}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(code)
