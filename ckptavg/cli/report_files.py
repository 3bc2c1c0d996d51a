"""The files of ``--report``: each in the format of its suffix, checked before the run and written after it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckptavg.errors import OutputExistsError, UsageError
from ckptavg.filesystem import atomic
from ckptavg.output.destination import preflight

if TYPE_CHECKING:
    from ckptavg.options import Options

_SUFFIXES: Final = (".html", ".md", ".json", "")


def check(names: Sequence[str], options: Options) -> None:
    """Refuse files that cannot be written, or that would be replaced unasked, before hours of work are spent."""
    for name in names:
        path = Path(name)
        with suppress(OSError):
            if _is_stream(path):
                continue
            if path.resolve() == options.destination[0].resolve():
                raise UsageError(f"--report and --output both name {path}")
        _check_format(path)
        if os.path.lexists(path) and not options.force:
            hint = "replace it with --force, or choose another --report"
            raise OutputExistsError("exists already", path=path, hint=hint)
        preflight(path, force=True)


def write(names: Sequence[str], report: Mapping[str, Any]) -> None:
    """Write a report, as `ckptavg.report.as_json.to_dict` returns it, to files."""
    for name in names:
        atomic.write_text(Path(name), rendered([report], Path(name)))


def rendered(reports: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Return the text of a file for one report, or several side by side, in the format of its suffix.

    Raises:
        UsageError: if there is no such format, or it needs a package that is not installed.
    """
    _check_format(path)
    if path.suffix == ".html":
        from ckptavg.report.page import page

        return page(reports)
    if path.suffix == ".md":
        from ckptavg.report.markdown import markdown

        return markdown(reports)
    return json.dumps(reports[0], indent=2, allow_nan=False) + "\n"


def _check_format(path: Path) -> None:
    if path.suffix not in _SUFFIXES and not _is_stream(path):
        raise UsageError(f"--report {path}: the suffix of a report is .html, .md or .json; without one it is JSON")
    if path.suffix == ".html":
        from ckptavg.report.page import check_installed

        check_installed()


def _is_stream(path: Path) -> bool:
    """Return whether ``path`` is a pipe or a device."""
    return path.exists() and not path.is_dir() and not path.is_file()
