"""Entry point of the command line, and the only place where errors are formatted."""

import errno
import os
import sys
import traceback
from typing import Final, NoReturn

from ckptavg.errors import CkptavgError, InterruptedRunError, OutOfMemoryError, OutputError, is_out_of_memory
from ckptavg.runtime import signals, threads
from ckptavg.runtime.imports import quick_imports
from ckptavg.runtime.workers import rank, silence

_STDOUT_IS_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def main() -> NoReturn:
    """Run ``ckptavg`` with the process's arguments and exit with its code."""
    try:
        _run()
    except signals.Interruption as error:  # also one raised while another error was being handled
        _fail(InterruptedRunError("interrupted"), error)


def _run() -> NoReturn:
    try:
        signals.install()
        threads.configure()
        _prepare_streams()
        with quick_imports():
            from ckptavg.cli.app import app, configured

        try:
            app(prog_name="ckptavg", default_map=configured())
        finally:
            sys.stdout.flush()
    except CkptavgError as error:
        _fail(error, error)
    except SystemExit as exit_request:
        if isinstance(exit_request.__context__, BrokenPipeError):  # Typer turns it into exit code 1
            _exit_if_stdout_failed(exit_request.__context__)
        signals.finish()
        raise
    except Exception as error:  # the outermost boundary: an exception that gets here is a bug in ckptavg
        if isinstance(error, OSError):
            _exit_if_stdout_failed(error)
        if is_out_of_memory(error):
            _fail(OutOfMemoryError("out of memory", hint="-v shows where; fewer candidates need less memory"), error)
        message = f"this is a bug in ckptavg: {type(error).__name__}: {error}"
        _fail(CkptavgError(message, hint="run it again with -v and report what it prints"), error)
    signals.finish()
    sys.exit(0)


def _exit_if_stdout_failed(error: OSError) -> None:
    """Exit if ``error`` is a failed write to stdout: the reader closed the pipe, or the disk is full."""
    full = error.filename is None and error.errno in _STDOUT_IS_FULL
    if not full and not isinstance(error, BrokenPipeError):
        return
    signals.finish()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter's flush at exit fails too
    if full:
        message = f"cannot be written: {os.strerror(error.errno or 0).lower()}"
        _fail(OutputError(message, path="stdout"), error)
    sys.exit(141)


def _prepare_streams() -> None:
    """Make the standard streams safe to use; ranks other than 0 print nothing."""
    # reopen closed ones on /dev/null, or the next file opened would receive their output
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore  # a file name may be any bytes
    if rank():
        os.dup2(2, 1)  # stdout carries data; output of a task or of its child processes goes to stderr
        silence()


def _fail(shown: CkptavgError, cause: BaseException) -> NoReturn:
    signals.finish()
    if {"-v", "--verbose"} & set(sys.argv):
        traceback.print_exception(cause)
    print(f"error: {shown}", file=sys.stderr)
    if shown.hint:
        print(f"hint: {shown.hint}", file=sys.stderr)
    sys.exit(shown.exit_code)


if __name__ == "__main__":
    main()
