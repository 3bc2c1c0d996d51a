"""Format an exception raised by task code as one line: file and line, function, batch and message."""

import re
import traceback
from pathlib import Path
from typing import Final

from torch.multiprocessing import reductions

from ckptavg.errors import TaskError
from ckptavg.runtime.seeds import LACKING
from ckptavg.tasks.guard import TooLongError

MOST: Final = 500  # characters kept of a message; some libraries print whole configurations
_DEAD: Final = re.compile(r"DataLoader worker \(pid.*", re.DOTALL)
_LOST_MEMORY: Final = re.compile(r"unable to open shared memory object .*No such file")


def task_error(
    source: str, function: str | None, at: str, error: BaseException, seconds: float | None = None
) -> TaskError:
    """Return ``task.py:12: in loss, batch 3 of val_dataloader: ValueError: …``, with the innermost line of that file.

    ``function`` is None for the import of the file, ``at`` the batch being used or loaded, ``seconds`` the time limit.
    """
    name = Path(source).name
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == name]
    message, hint = _error_message(error), "-v shows the traceback"
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).name == name:
        lines.append(error.lineno)
    if "Original Traceback" in message:  # that of a DataLoader worker
        lines += [int(line) for line in re.findall(rf'File "[^"]*\b{re.escape(name)}", line (\d+)', message)]
        message = f"{message.rstrip().splitlines()[-1].strip()} (in a worker process)"
    if isinstance(error, TooLongError):
        message, hint = f"took more than {seconds:g} s", "raise the limit with --task-timeout"
    elif isinstance(error, SystemExit) and function is None:
        hint = "does it parse arguments when it is imported? put that under: if __name__ == '__main__'"
    elif "more than 1 value per channel" in message:  # BatchNorm uses batch statistics here, also for the last batch
        hint = "BatchNorm needs two examples or more in every batch: set drop_last=True in the loader"
    elif LACKING in message:
        message, hint = message.partition(LACKING)[0] + LACKING, "leave out --deterministic, or use another operation"
    elif death := _worker_death(message, error):
        function = at.rpartition(" of ")[2] or function
        message = f"a worker process died: {death}"
        hint = "was it killed for using too much memory? num_workers=0 shows the errors of the dataset itself"
    message = " ".join(message.split())
    if len(message) > MOST:
        message = f"{message[:MOST]} …"
    where = f"{source}:{lines[-1]}" if lines else source
    lead = f"in {function}{at and ', ' + at.removesuffix(f' of {function}')}: " if function else "on import: "
    return TaskError(lead + message, path=where, hint=hint)


def _error_message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # the exception class is the task's, and its __str__ may fail in any way
        text = "(message unavailable: its __str__ failed)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _worker_death(message: str, error: BaseException) -> str | None:
    """Return the part of an error message that reports the death of a worker process; None for any other error.

    Torch reports a death from its SIGCHLD handler, or when it waits for a batch. A batch that was sent before the death
    fails earlier: its memory is fetched from the worker by a socket or a file, which no longer exist.
    """
    if match := _DEAD.search(message):
        return match[0]
    gone = isinstance(error, FileNotFoundError | ConnectionError | EOFError)
    frames = traceback.extract_tb(error.__traceback__) if gone else []
    fetching = any(frame.filename == reductions.__file__ for frame in frames)
    return message if fetching or _LOST_MEMORY.search(message) else None
