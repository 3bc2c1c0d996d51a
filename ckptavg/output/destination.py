"""Resolve the output path and check that it can be written."""

import errno
import os
import re
import shlex
import stat
from pathlib import Path
from typing import Final

from ckptavg.errors import OutputError, OutputExistsError, UsageError
from ckptavg.filesystem.atomic import longest_name
from ckptavg.filesystem.regular_file import is_folder

_FILE_NAME: Final = "model.safetensors"  # the name that every loader expects in an output directory
_FOREIGN: Final = re.compile(  # suffixes of weights, archives and texts, and of pictures
    r"(?<=.)(\.(ckpt|pth?|bin|tar|pkl|pickle|joblib|np[yz]|h5|hdf5|keras|gguf|ggml|onnx|msgpack|pb|tflite|mlmodel"
    r"|zip|gz|bz2|xz|zst|tgz|jsonl?|ya?ml|toml|txt|md|rst|log|[ct]sv|parquet|html|py|ipynb|svg|png|jpe?g|gif|pdf))+$",
    re.IGNORECASE,
)


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


def check_suffix(output: Path | str) -> None:
    """Raise UsageError if the name of an output file is that of another format, whose loaders could not read it.

    An unknown suffix, as in ``avg.v2`` or ``lr0.1``, is a part of the name.
    """
    path, folder = destination(output)
    stem = _FOREIGN.sub("", path.name)
    if folder or stem == path.name:
        return
    suffix, name = path.suffix, str(path.with_name(f"{stem.removesuffix('.safetensors')}.safetensors"))
    hint = f"-o {shlex.quote(name)}, and load it with model.load_state_dict(safetensors.torch.load_file({name!r}))"
    if suffix == ".bin":
        hint += f"; -o {shlex.quote(f'{path.with_name(stem)}/')} is a directory for from_pretrained"
    elif suffix == ".json":
        hint = f"-o {shlex.quote(name)} --report {shlex.quote(str(path))}, which has the report as JSON"
    message = f"--output {path}: a safetensors file is written, which no reader of {suffix} files can load"
    raise UsageError(message, hint=hint)


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
