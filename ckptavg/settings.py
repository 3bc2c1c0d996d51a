"""Options that stand in a file: the working directory's ``ckptavg.toml``, or its ``pyproject.toml``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ckptavg.errors import UsageError


def read(folder: Path) -> dict[str, Any]:
    """Option → value (``[tool.ckptavg]`` in pyproject.toml), dashes as underscores; empty where there is no file.

    Raises:
        UsageError: if the file is not TOML.
    """
    for name, table in (("ckptavg.toml", ()), ("pyproject.toml", ("tool", "ckptavg"))):
        path = folder / name
        if not path.is_file():
            continue
        try:
            values: Any = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"is not valid TOML: {error}", path=path) from error
        for part in table:
            values = values.get(part, {})
        if values:
            return {str(key).replace("-", "_"): _plain(value) for key, value in values.items()}
    return {}


def _plain(value: Any) -> Any:
    """A list as the command line would have it."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
