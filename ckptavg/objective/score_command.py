"""A shell command that prints the score of a model on disk."""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ckptavg.errors import TaskError
from ckptavg.runtime import signals

_FILE: Final = "{}"
_DIRECTORY: Final = "{dir}"
_NUMBER: Final = re.compile(
    r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])|(?<!\w)[-+]?(?:nan|inf)(?!\w)"
)
_SHOWN: Final = 10  # lines of a failed command's output that the error shows


class ScoreCommand:
    """A command for ``/bin/sh -c``, with ``{}`` for a safetensors file and ``{dir}`` for its directory.

    Args:
        command: the command; without ``{}`` or ``{dir}``, the file is appended as last argument.
        key: the entry of a JSON line that holds the score, dots for nesting; None takes the last number printed.
        timeout: its time limit in seconds.
    """

    def __init__(self, command: str, key: str | None = None, timeout: float | None = None) -> None:
        self._command = command if _FILE in command or _DIRECTORY in command else f"{command} {_FILE}"
        self._key = key
        self._timeout = timeout
        self.name = key or "score"  # of the number, in reports

    @property
    def needs_directory(self) -> bool:
        """True if the command reads more than the safetensors file."""
        return _DIRECTORY in self._command

    def run(self, path: Path, environment: Mapping[str, str] | None = None) -> float:
        """Run the command on a file and return the number that it prints.

        Raises:
            TaskError: if it fails, takes too long, or prints no finite number.
        """
        command = self._command.replace(_DIRECTORY, shlex.quote(str(path.parent)))
        command = command.replace(_FILE, shlex.quote(str(path)))
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True, env=environment,
        )  # fmt: skip
        try:
            with signals.at_once():
                out, err = process.communicate(timeout=self._timeout)
        except BaseException as error:  # kill the process group: the command may have started other processes
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                message = f"--score-cmd took more than {self._timeout:g} s"
                raise TaskError(message, hint="raise the limit with --score-timeout") from error
            raise
        if process.returncode:
            raise TaskError(f"--score-cmd failed with exit code {process.returncode}: {_tail(err)}", hint=command)
        values = list(numbers(out) if self._key is None else entries(out, self._key))
        if not values:
            wanted = "no number" if self._key is None else f"no JSON line with a number at {self._key}"
            raise TaskError(f"--score-cmd printed {wanted} on stdout: {_tail(out) or _tail(err)}", hint=command)
        if not math.isfinite(values[-1]):
            raise TaskError(f"--score-cmd printed {values[-1]}", hint=command)
        return values[-1]


def numbers(text: str) -> Iterator[float]:
    """Yield every number in ``text``, in order."""
    return (float(match.group()) for match in _NUMBER.finditer(text))


def entries(text: str, key: str) -> Iterator[float]:
    """Yield the numbers at ``key`` in the lines of ``text`` that are JSON objects."""
    for line in text.splitlines():
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue
        number = _at(value, key)
        if isinstance(number, int | float) and not isinstance(number, bool):
            yield float(number)


def _at(value: Any, key: str) -> Any:
    if not isinstance(value, dict) or key in value or "." not in key:
        return value.get(key) if isinstance(value, dict) else None
    head, _, rest = key.partition(".")
    return _at(value.get(head), rest)


def _tail(text: str) -> str:
    """Join the last lines of ``text`` into one, for an error message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_SHOWN:]) or "no output"
