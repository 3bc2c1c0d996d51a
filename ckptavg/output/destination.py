"""Resolve the output path and check that it can be written."""

import errno
import os
import stat
from pathlib import Path
from typing import Final

from ckptavg.errors import OutputError, OutputExistsError, UsageError
from ckptavg.filesystem.atomic import longest_name
from ckptavg.filesystem.regular_file import is_folder

_FILE_NAME: Final = "model.safetensors"  # the name that every loader expects in an output directory


def destination(output: Path | str) -> tuple[Path, Path | None]:
    """Return the file to write and, if ``output`` names a directory, that directory; raises UsageError for the root."""
    if str(output) and Path(output).name in ("", ".."):  # the journal next to it is named after it
        try:
            output = Path(output).resolve()
        except OSError as error:
            raise UsageError(f"--output {output}: the working directory no longer exists") from error
        if not output.name:
            raise UsageError(f"--output {output} has no name: choose a file or a directory with one")
    if str(output).endswith("/") or is_folder(Path(output)):
        return Path(output) / _FILE_NAME, Path(output)
    return Path(output), None


def preflight(path: Path, force: bool) -> None:
    """Check that the destination can be written, before hours of work.

    Raises:
        OutputExistsError: if it exists and ``force`` is not given.
        OutputError: if its directory does not exist or is not writable, its name is too long, or it is a directory.
    """
    if os.path.isdir(path):  # noqa: PTH112  # False if it cannot be accessed
        raise OutputError("is a directory", path=path)
    if os.path.lexists(path) and not force:
        raise exists_error(path)
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raise OutputError unless the destination's directory exists, is writable and allows so long a file name."""
    try:
        folder = stat.S_ISDIR(path.parent.stat().st_mode)
    except FileNotFoundError as error:
        raise OutputError("no such directory", path=path.parent, hint=f"mkdir -p '{path.parent}'") from error
    except (OSError, ValueError) as error:
        raise OutputError(os.strerror(getattr(error, "errno", 0) or errno.EINVAL).lower(), path=path.parent) from error
    if not folder:
        raise OutputError("is not a directory", path=path.parent)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError("permission denied", path=path.parent)
    if (size := len(os.fsencode(path.name))) > (limit := longest_name(path.parent)):
        raise OutputError(f"file name too long: {size} bytes, but at most {limit} are possible here", path=path)


def exists_error(path: Path) -> OutputExistsError:
    """Return the error for an output that already exists."""
    return OutputExistsError("exists already", path=path, hint="replace it with --force, or choose another -o")
