"""Read options from ``ckptavg.toml`` or ``pyproject.toml`` in the working directory."""

import os
import tomllib
from pathlib import Path
from typing import Any, Final

from ckptavg.errors import UsageError
from ckptavg.filesystem.regular_file import is_file

NAMES: Final = "ckptavg.toml, or [tool.ckptavg] of pyproject.toml"


def read(folder: Path) -> dict[str, Any]:
    """Return option → value, with underscores for dashes; empty if there is no file or no ``[tool.ckptavg]`` table.

    Raises:
        UsageError: if the file cannot be read, is not TOML, or has a value of an unsupported type.
    """
    for name, table in (("ckptavg.toml", ()), ("pyproject.toml", ("tool", "ckptavg"))):
        path = folder / name
        if not is_file(path):
            continue
        try:
            values: Any = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(os.strerror(error.errno or 0).lower(), path=path) from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"is not valid TOML: {error}", path=path) from error
        for part in table:
            values = values.get(part, {}) if isinstance(values, dict) else {}
        if isinstance(values, dict) and values:
            return {str(key).replace("-", "_"): _plain(path, key, value) for key, value in values.items()}
    return {}


def _plain(path: Path, key: str, value: Any) -> str:
    """Return a value in its command-line form."""
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ",".join(map(str, value))
    if not isinstance(value, str | int | float):
        raise UsageError(f"{key} must be a number, a text, true or false, or a list of these", path=path)
    return str(value)
