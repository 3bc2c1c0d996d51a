"""Errors that a user can act on, one class per exit code; formatted only in `ckptavg.__main__`."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Final

_LONGEST: Final = 600  # characters of text taken from a file


class CkptavgError(Exception):
    """Error that the user can act on: ``FILE: TENSOR: what is wrong`` and, where it helps, a hint.

    Args:
        what: the problem in one line, with the actual and the expected value.
        hint: the next command or change to try.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, path: Path | str | None = None, tensor: str | None = None, hint: str | None = None
    ) -> None:
        parts = [str(path) if path is not None else None, _short(tensor), _short(what)]
        super().__init__(": ".join(printable(part) for part in parts if part is not None))
        self.hint = printable(hint) if hint else None

    @property
    def __notes__(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The hint, which Python prints below a traceback."""
        return [f"hint: {self.hint}"] if self.hint else []


class UsageError(CkptavgError):
    """Invalid arguments of the command or call."""

    exit_code = 2


class TooFewError(UsageError):
    """Number of candidates that a setting needs and that are not there (yet)."""


class InputError(CkptavgError):
    """Unreadable, damaged or otherwise unusable input file."""

    exit_code = 3


class DisagreementError(CkptavgError):
    """Mismatch between checkpoints in tensor names, shapes or dtypes."""

    exit_code = 4


class OutputError(CkptavgError):
    """Output that cannot be written."""

    exit_code = 5


class OutputExistsError(CkptavgError):
    """Output that exists already, or that another process is writing."""

    exit_code = 6


class TaskError(CkptavgError):
    """Failure in the code or the metric of the task."""

    exit_code = 7


class NotFiniteError(TaskError):
    """A loss that is NaN or infinite."""


class OutOfMemoryError(CkptavgError):
    """Shortage of device or host memory."""

    exit_code = 8


class InterruptedRunError(CkptavgError):
    """Run ended early by a signal; nothing was written."""

    exit_code = 75


def printable(text: str) -> str:
    """Return ``text`` on one line, with control characters and undecodable bytes as backslash escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in text
    )


def counted(number: int, noun: str, plural: str = "s") -> str:
    """Return a number with its noun, with the ending of the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def decimal(value: float | None, sign: str = "", places: int = 4) -> str:
    """Format a score with a number of decimals, from 10⁵ on with four significant digits; None is empty.

    Args:
        sign: "+" for a sign before positive numbers too.
        places: the decimals; `ckptavg.report.digits` has those that the noise of a score allows.
    """
    if value is None:
        return ""
    return f"{value:{sign}.{places}f}" if abs(value) < 1e5 else f"{value:{sign}.4g}"


def nearest(name: str, names: Iterable[str], otherwise: str | None = None) -> str:
    """Return a hint with the one of ``names`` that is most like ``name``, else ``otherwise``, else all of them."""
    names = list(names)
    close = difflib.get_close_matches(name, names, 1)
    return f"did you mean {close[0]!r}?" if close else otherwise or f"choose from {', '.join(names) or 'none'}"


def _short(text: str | None) -> str | None:
    """Truncate text taken from a file, which may be arbitrarily long."""
    return text if text is None or len(text) <= _LONGEST else f"{text[:500]}… ({len(text):,} characters)"


def escaped_glob(name: str) -> str:
    """Return the glob that matches ``name`` and no other printable name."""
    return "".join(f"[{char}]" if char in "*?[" else char if char.isprintable() else "?" for char in name)


def choosing(option: str, glob: str) -> str:
    """Return an option of the command line with a shell-quoted glob."""
    return f"{option} '" + glob.replace("'", "'\\''") + "'"


def excluding(name: str) -> str:
    """Return the ``--exclude`` option that matches the checkpoint ``name`` and no other."""
    return choosing("--exclude", escaped_glob(name))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` means host or device memory ran out; does not import torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    on_host = type(error) is RuntimeError and "DefaultCPUAllocator: can't alloc" in str(error)
    return on_host or isinstance(error, MemoryError) or "OutOfMemoryError" in names
