"""Where the output goes, and whether it can be written there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from ckptavg.errors import OutputError, OutputExistsError, UsageError
from ckptavg.filesystem.atomic import longest_name
from ckptavg.filesystem.regular_file import is_folder

_FILE_NAME: Final = "model.safetensors"  # in an output directory, what every loader looks for


def destination(output: Path | str) -> tuple[Path, Path | None]:
    """The file to write, and its directory where the directory is what was asked for.

    Raises:
        UsageError: if that is the root.
    """
    if str(output) and Path(output).name in ("", ".."):  # what lies beside it needs its name
        try:
            output = Path(output).resolve()
        except OSError as error:
            raise UsageError(f"--output {output}: the working directory is gone") from error
        if not output.name:
            raise UsageError(f"--output {output} has no name: choose a file or a directory with one")
    if str(output).endswith("/") or is_folder(Path(output)):
        return Path(output) / _FILE_NAME, Path(output)
    return Path(output), None


def preflight(path: Path, force: bool) -> None:
    """Refuse a destination that cannot be written, before hours of work for it.

    Raises:
        OutputExistsError: if it exists and ``force`` is not given.
        OutputError: if its directory does not exist or is not writable, its name is too long, or it is a directory.
    """
    if os.path.isdir(path):  # noqa: PTH112  # False where it cannot be looked at
        raise OutputError("is a directory", path=path)
    if os.path.lexists(path) and not force:
        raise exists_error(path)
    check_parent(path)


def check_parent(path: Path) -> None:
    """Refuse a destination whose directory is not there or not writable, or that has too long a name for it.

    Raises:
        OutputError: naming the directory, or the destination.
    """
    try:
        folder = stat.S_ISDIR(path.parent.stat().st_mode)
    except FileNotFoundError as error:
        raise OutputError("no such directory", path=path.parent, hint=f"mkdir -p '{path.parent}'") from error
    except (OSError, ValueError) as error:
        raise OutputError(os.strerror(getattr(error, "errno", 0) or errno.EINVAL).lower(), path=path.parent) from error
    if not folder:
        raise OutputError("is no directory", path=path.parent)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError("permission denied", path=path.parent)
    if (size := len(os.fsencode(path.name))) > (most := longest_name(path.parent)):
        raise OutputError(f"file name too long: {size} bytes, but {most} are possible here", path=path)


def exists_error(path: Path) -> OutputExistsError:
    """Build the error for an output that exists."""
    return OutputExistsError("exists already", path=path, hint="replace it with --force, or choose another -o")
