"""A shell command that prints the score of a model on disk."""

import contextlib
import math
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

from ckptavg.errors import TaskError
from ckptavg.objective.printed_score import PrintedScore, numbers_by_key, read_score

_FILE: Final = "{}"
_DIRECTORY: Final = "{dir}"
_SHOWN: Final = 10  # lines of a failed command's output that the error shows
_NOT_STARTED: Final = (126, 127)  # exit codes of a shell for a program that it cannot run, whatever the file


class FailedRunError(TaskError):
    """A run that gives no score of its file: the command failed, took too long, or printed no finite number."""


class ScoreCommand:
    """A command for ``/bin/sh -c``, with ``{}`` for a safetensors file and ``{dir}`` for its directory.

    Args:
        command: the command; without ``{}`` or ``{dir}``, the file is appended as last argument.
        key: the entry of a JSON object that holds the score, dots for nesting; see `read_score`.
        timeout: its time limit in seconds.
    """

    def __init__(self, command: str, key: str | None = None, timeout: float | None = None) -> None:
        self._command = command if _FILE in command or _DIRECTORY in command else f"{command} {_FILE}"
        self.key = key
        self.timeout = timeout
        self.name = key or "score"  # of the number, in reports

    @property
    def needs_directory(self) -> bool:
        """True if the command reads more than the safetensors file."""
        return _DIRECTORY in self._command

    def line(self, path: Path) -> str:
        """Return the command for the shell that scores ``path``."""
        command = self._command.replace(_DIRECTORY, shlex.quote(str(path.parent)))
        return command.replace(_FILE, shlex.quote(str(path)))


class RunningCommand:
    """A run of a command on one file, in a process group of its own; to be closed."""

    def __init__(self, command: ScoreCommand, path: Path, environment: Mapping[str, str]) -> None:
        self._command = command
        # files, since a pipe may be full; open as long as this object
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._deadline = math.inf if command.timeout is None else time.monotonic() + command.timeout
        self._late = False
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", command.line(path)], stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._errors,
            start_new_session=True, env=environment,
        )  # fmt: skip

    def ended(self) -> bool:
        """Return whether it has ended, or has exceeded its time limit and was killed."""
        if self._process.poll() is None and time.monotonic() > self._deadline:
            self._late = True
            self._kill()
        return self._process.returncode is not None

    def score(self) -> PrintedScore:
        """Return the score that it printed.

        Raises:
            FailedRunError: if it gave no score of this file.
            TaskError: if it would give none of any file.
        """
        if self._late:
            message = f"--score-cmd took more than {self._command.timeout:g} s"
            raise FailedRunError(message, hint="raise the limit with --score-timeout")
        code, key, output, errors = (
            self._process.returncode,
            self._command.key,
            _read(self._output),
            _read(self._errors),
        )
        said = _tail(output) or _tail(errors) or "no output"
        if code:
            kind = TaskError if code in _NOT_STARTED else FailedRunError
            raise kind(f"--score-cmd failed with exit code {code}: {_tail(errors) or said}")
        score = read_score(output, key)
        if score is None and key is not None:
            keys = numbers_by_key(output)
            where = f"but at {', '.join(keys)}" if keys else f"and no other JSON: {said}"
            message = f"--score-cmd printed no JSON with a number at {key}, {where}"
            raise FailedRunError(message, hint=None if keys else "print(json.dumps(result)) prints JSON")
        if score is None:
            raise FailedRunError(f"--score-cmd printed no number on stdout: {said}")
        if not math.isfinite(score.number):
            raise FailedRunError(f"--score-cmd printed {score.number}")
        return score

    def close(self) -> None:
        """End it if it still runs, and discard its output."""
        if self._process.poll() is None:
            self._kill()
        self._output.close()
        self._errors.close()

    def _kill(self) -> None:
        """End the process group: the command may have started other processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _tail(text: str) -> str:
    """Join the last lines of ``text`` into one, for an error message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_SHOWN:])
