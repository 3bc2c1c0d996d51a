"""The entry point: runs the command line, and is the one place where errors are formatted."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from ckptavg.errors import CkptavgError, UsageError, printable
from ckptavg.workers import mute, rank


def main() -> NoReturn:
    """Run ``ckptavg`` with the process's arguments and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore  # a file name may be any bytes
    if rank():
        mute()
    for warning in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler's ends a run as Ctrl-C does
        signal.signal(warning, signal.default_int_handler)
    try:
        from ckptavg.cli.app import app

        app(prog_name="ckptavg", default_map=_configured())
    except CkptavgError as error:
        _fail(error, error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain again
        sys.exit(141)
    except Exception as error:  # the outermost boundary: what gets here is our bug
        what = f"this is a bug in ckptavg: {type(error).__name__}: {error}"
        _fail(CkptavgError(what, hint="run it again with -v and report what it prints"), error)
    sys.exit(0)


def _fail(shown: CkptavgError, cause: BaseException) -> NoReturn:
    if {"-v", "--verbose"} & set(sys.argv):
        traceback.print_exception(cause)
    print(f"error: {shown}", file=sys.stderr)
    if shown.hint:
        print(f"hint: {shown.hint}", file=sys.stderr)
    sys.exit(shown.exit_code)


def _configured() -> dict[str, dict[str, Any]]:
    """The configuration file's options as every command's defaults."""
    from ckptavg import settings
    from ckptavg.cli.app import app

    values = settings.read(Path.cwd())
    known = {
        name: set(command.callback.__annotations__) - {"task"}  # pyright: ignore  # which has an order of its own
        for command in app.registered_commands
        for name in [command.name]
    }
    unknown = values.keys() - {"task"} - set().union(*known.values())
    if unknown:
        raise UsageError(f"the configuration file has unknown options: {', '.join(map(printable, sorted(unknown)))}")
    return {str(name): {key: values[key] for key in values.keys() & options} for name, options in known.items()}


if __name__ == "__main__":
    main()
