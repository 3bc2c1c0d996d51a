"""Which task file a run uses, and why one that merely lies among the checkpoints is never run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckptavg import settings
from ckptavg.errors import UsageError
from ckptavg.options import Options
from ckptavg.readers.regular_file import is_file


def with_task(options: Options, inputs: Sequence[Path], *, required: bool) -> Options:
    """``options`` with the task file that `find` finds, unless they say otherwise how a mixture is scored."""
    if set(options.ways) - {"--task"}:
        return options
    return replace(options, task=find(options.task, inputs, required=required))


def find(option: str | None, inputs: Sequence[Path], *, required: bool = True) -> str | None:
    """The option, then ``CKPTAVG_TASK``, then ``task`` in the configuration file, then ``./task.py``, else None.

    Only from the working directory or by name: a ``task.py`` that lies among the checkpoints is not run.

    Args:
        option: what was named.
        inputs: where the checkpoints lie.
        required: whether there is nothing to do without a task.
    Raises:
        UsageError: if a task is required and there is only a ``./task.py`` that lies among the checkpoints.
    """
    named = option or os.environ.get("CKPTAVG_TASK") or settings.read(Path()).get("task")
    if named or not is_file(Path("task.py")):
        return named
    here = Path.cwd().resolve()
    if any(path.resolve() == here or (is_file(path) and path.resolve().parent == here) for path in inputs):
        if not required:
            return None
        raise UsageError(
            "./task.py lies among the checkpoints, so it is not run unasked",
            hint="if you trust it, name it: --task ./task.py",
        )
    return "task.py"
