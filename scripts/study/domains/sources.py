"""Text that is available with every Python: the sources of its standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Final

MODULES: Final = (
    "_pydecimal",
    "argparse",
    "difflib",
    "inspect",
    "statistics",
    "subprocess",
    "tarfile",
    "typing",
)


def text_of(module: str) -> str:
    """Return the source of a standard-library module, without importing it."""
    return Path(sysconfig.get_path("stdlib"), f"{module}.py").read_text(encoding="utf-8")
