"""The libraries behind Hugging Face tasks: imported when needed, without network access, their errors in one line."""

import importlib
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from ckptavg.errors import CkptavgError, TaskError, UsageError, is_out_of_memory

WRITE_ONE: Final = "write a task file: `ckptavg init`"


def imported(module: str, extra: str = "hf") -> Any:
    """Import and return a module that an ``extra`` of ckptavg installs; UsageError naming the extra without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"this task needs `{module}`", hint=f"pip install 'ckptavg[{extra}]'") from error


@contextmanager
def translate_errors(source: str, subject: str) -> Generator[None]:
    """Turn exceptions of the libraries into one-line errors that begin with ``source`` and ``subject``."""
    try:
        yield
    except Exception as error:  # boundary to third-party code
        if isinstance(error, CkptavgError) or is_out_of_memory(error):
            raise
        first_line = next(iter(str(error).strip().splitlines()), "")
        message = f"{subject}: {type(error).__name__}: {first_line}"
        raise TaskError(message, path=source, hint="-v shows the traceback") from error


@contextmanager
def offline() -> Generator[None]:
    """Block network access, which `local_files_only` alone does not, and silence warnings and progress bars."""
    log = imported("transformers").utils.logging
    constants: Any = importlib.import_module("huggingface_hub.constants")
    level, bars, before = log.get_verbosity(), log.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
    log.set_verbosity_error()
    log.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
