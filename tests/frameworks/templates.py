"""The files of ``ckptavg init``, filled in as their comments ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from conftest import Run


def fill_in(run: Run, folder: Path, option: str, edits: Mapping[str, str]) -> Path:
    """Write the file of an option into ``folder``, and replace texts, each on a line that is marked EDIT."""
    done = run("init", option, cwd=folder)
    assert done.returncode == 0, done.stderr
    path = folder / done.stdout.strip()
    lines = path.read_text().splitlines(keepends=True)
    for old, new in edits.items():
        (i,) = (i for i, line in enumerate(lines) if old in line and "EDIT" in line)
        lines[i] = lines[i].replace(old, new)
    path.write_text("".join(lines))
    return path
