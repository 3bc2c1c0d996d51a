"""The output that several runs write in turn: one of them replaces it only if it is as the last one left it."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from ckptavg.errors import OutputExistsError
from ckptavg.journal import Journal
from ckptavg.options import Options

KEY: Final = "output"  # of its record in the journal


def record(journal: Journal, output: Path) -> None:
    """Record the file or directory just written."""
    journal.put(KEY, {"path": str(output), "identity": _identity(output)})


def permitted(options: Options, journal: Journal) -> Options:
    """Return the options, with permission to replace the output if it is the recorded one.

    Raises:
        OutputExistsError: if it has changed since, and ``--force`` is not given.
    """
    written = journal.get(KEY)
    now = written and _identity(Path(written["path"]))
    if not now or options.force:
        return options
    if now != written["identity"]:
        message, hint = "was changed by another program since it was written", "choose another -o"
        raise OutputExistsError(message, path=written["path"], hint=hint)
    return replace(options, force=True)


def _identity(path: Path) -> list[int] | None:
    """Return what changes with the file or directory; None if there is none."""
    with suppress(OSError):
        status = path.stat()
        return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    return None
