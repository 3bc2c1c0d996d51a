"""The output that several runs write in turn: one of them replaces it only if it is as the last one left it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from ckptavg.errors import OutputExistsError
from ckptavg.journal import Journal
from ckptavg.options import Options

KEY: Final = "output"  # of its record in the journal


def record(journal: Journal, output: Path, status: os.stat_result) -> None:
    """Record a file or directory with the status that it had before others could see it."""
    journal.put(KEY, {"path": str(output), "identity": _identity(status)})


def permitted(options: Options, journal: Journal) -> Options:
    """Return the options, with permission to replace the output if it is the recorded one.

    Raises:
        OutputExistsError: if it has changed since, and ``--force`` is not given.
    """
    written = journal.get(KEY)
    if not written or options.force:
        return options
    try:
        now = _identity(Path(written["path"]).stat())
    except OSError:  # there is none
        return options
    if now != written["identity"]:
        message, hint = "was changed by another program since it was written", "choose another -o"
        raise OutputExistsError(message, path=written["path"], hint=hint)
    return replace(options, force=True)


def _identity(status: os.stat_result) -> list[int]:
    """Return what changes with a file or directory."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
