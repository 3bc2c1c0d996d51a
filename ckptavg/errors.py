"""What can go wrong for a user, one class an exit code; formatted once, in the command line's entry point."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Final

_LONGEST: Final = 600  # characters of what a file says


class CkptavgError(Exception):
    """Something the user can act on: ``FILE: TENSOR: what is wrong`` and, where it helps, a hint.

    Args:
        what: what is wrong, what was found and what was expected, in one line.
        path: the file it is about.
        tensor: the tensor it is about.
        hint: the next command or change that would help.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, path: Path | str | None = None, tensor: str | None = None, hint: str | None = None
    ) -> None:
        parts = [str(path) if path is not None else None, _short(tensor), _short(what)]
        super().__init__(": ".join(printable(part) for part in parts if part is not None))
        self.hint = printable(hint) if hint else None


class UsageError(CkptavgError):
    """The command or call asks for something that cannot be."""

    exit_code = 2


class InputError(CkptavgError):
    """An input file is bad."""

    exit_code = 3


class DisagreementError(CkptavgError):
    """The checkpoints do not agree in names, shapes or dtypes."""

    exit_code = 4


class OutputError(CkptavgError):
    """The output cannot be written."""

    exit_code = 5


class OutputExistsError(CkptavgError):
    """The output exists, or somebody else is writing it."""

    exit_code = 6


class TaskError(CkptavgError):
    """The task's code or its metric failed."""

    exit_code = 7


class OutOfMemoryError(CkptavgError):
    """Device or host memory does not suffice."""

    exit_code = 8


class InterruptedRunError(CkptavgError):
    """A signal ended the run before it was done; nothing was written."""

    exit_code = 75


def printable(text: str) -> str:
    """``text`` on one line, with control characters and undecodable bytes as backslash escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in text
    )


def _short(text: str | None) -> str | None:
    """The beginning of what a file may have made endless."""
    return text if text is None or len(text) <= _LONGEST else f"{text[:500]}… ({len(text):,} characters)"


def excluding(name: str) -> str:
    """The option that leaves out the checkpoint called ``name`` and no other, quoted as a shell wants it."""
    glob = "".join(f"[{char}]" if char in "*?[" else char if char.isprintable() else "?" for char in name)
    return "--exclude '" + glob.replace("'", "'\\''") + "'"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a lack of host or device memory, told without importing torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return True
    return type(error) is RuntimeError and "DefaultCPUAllocator: can't alloc" in str(error)
