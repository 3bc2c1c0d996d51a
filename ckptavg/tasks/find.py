"""Which task file a run uses, and why one that merely lies among the checkpoints is never run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ckptavg import settings
from ckptavg.errors import UsageError


def find(option: str | None, inputs: Sequence[Path]) -> str | None:
    """The option, then ``CKPTAVG_TASK``, then ``task`` in the configuration file, then ``./task.py``, else None.

    Only from the working directory or by name: a ``task.py`` that lies among the checkpoints is not run.

    Raises:
        UsageError: if ``./task.py`` would be used but the working directory is itself an input.
    """
    named = option or os.environ.get("CKPTAVG_TASK") or settings.read(Path.cwd()).get("task")
    if named or not Path("task.py").is_file():
        return named
    here = Path.cwd().resolve()
    if any(path.resolve() == here or (path.is_file() and path.resolve().parent == here) for path in inputs):
        raise UsageError(
            "./task.py lies among the checkpoints, so it is not run unasked",
            hint="if you trust it, name it: --task ./task.py",
        )
    return "task.py"
