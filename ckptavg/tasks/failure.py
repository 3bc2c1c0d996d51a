"""What a task's code raised, as one line: the place in its file, the function, the batch, and what it said."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Final

from torch.multiprocessing import reductions

from ckptavg.errors import TaskError
from ckptavg.runtime.seeds import LACKING
from ckptavg.tasks.guard import TooLongError

MOST: Final = 500  # characters of a message; some libraries print whole configurations
_DEAD: Final = re.compile(r"DataLoader worker \(pid.*", re.DOTALL)
_LOST_MEMORY: Final = re.compile(r"unable to open shared memory object .*No such file")


def task_error(
    source: str, function: str | None, at: str, error: BaseException, seconds: float | None = None
) -> TaskError:
    """``task.py:12: in loss, batch 3 of val_dataloader: ValueError: …``, the line being the innermost of its own file.

    Args:
        source: the task file.
        function: of it, None while it was imported.
        at: which batch it had, or was to give.
        error: what it raised.
        seconds: the limit, where it was that it took too long.
    """
    name = Path(source).name
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == name]
    what, hint = _error_message(error), "-v shows the traceback"
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).name == name:
        lines.append(error.lineno)
    if inner := _in_data_worker(what):  # its traceback is in the text
        lines += [int(line) for line in re.findall(rf'File "[^"]*\b{re.escape(name)}", line (\d+)', what)]
        what = f"{inner} (in a worker process)"
    if isinstance(error, TooLongError):
        what, hint = f"took more than {seconds:g} s", "give it longer with --task-timeout"
    elif isinstance(error, SystemExit) and function is None:
        hint = "does it parse arguments when it is imported? put that under: if __name__ == '__main__'"
    elif "more than 1 value per channel" in what:  # BatchNorm learns from batches here, also in the last one
        hint = "BatchNorm needs two examples or more in every batch: set drop_last=True in the loader"
    elif LACKING in what:
        what, hint = what.partition(LACKING)[0] + LACKING, "leave out --deterministic, or use another operation"
    elif death := _worker_death(what, error):
        function = at.rpartition(" of ")[2] or function
        what = f"a worker process died: {death}"
        hint = "was it killed for its memory? num_workers=0 shows errors of the data themselves"
    where = f"{source}:{lines[-1]}" if lines else source
    lead = f"in {function}{at and ', ' + at.removesuffix(f' of {function}')}: " if function else "on import: "
    return TaskError(lead + _shortened(what), path=where, hint=hint)


def _error_message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # it is not ours, and may fail at anything
        text = "(it cannot say what)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _worker_death(what: str, error: BaseException) -> str | None:
    """The part of an error's text that reports the death of a worker process; None if the error is of another kind.

    Torch reports a death from its SIGCHLD handler, or when it looks for a batch. A batch that was sent before the death
    fails earlier: its memory is fetched from the worker by a socket or a file, which are gone.
    """
    if match := _DEAD.search(what):
        return match[0]
    gone = isinstance(error, FileNotFoundError | ConnectionError | EOFError)
    frames = traceback.extract_tb(error.__traceback__) if gone else []
    fetching = any(frame.filename == reductions.__file__ for frame in frames)
    return what if fetching or _LOST_MEMORY.search(what) else None


def _in_data_worker(what: str) -> str:
    """The last line of the traceback that a loader's worker process sent, if there is one in the text."""
    if "Original Traceback" not in what:
        return ""
    return next((line for line in reversed(what.splitlines()) if line.strip()), "").strip()


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= MOST else f"{words[:MOST]} …"
