"""``ckptavg report``: make a page or a text from the JSON reports of earlier runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    reports: Annotated[
        list[Path],
        typer.Argument(help="JSON reports, written by --report or --json.", metavar="RUN.json", readable=False),
    ],
    file: Annotated[
        Path, typer.Option("-o", "--output", help="File to write, .html or .md.", readable=False)
    ] = Path("report.html"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:  # fmt: skip
    """Make a page (.html) or a text (.md) from JSON reports; several are put side by side."""
    from ckptavg.cli import report_files
    from ckptavg.errors import OutputExistsError, UsageError
    from ckptavg.filesystem.atomic import write_text

    if os.path.lexists(file) and not force:
        raise OutputExistsError("exists already", path=file, hint="--force replaces it")
    if file.suffix not in (".html", ".md"):
        raise UsageError(f"-o {file}: the suffix is .html or .md", hint=f"-o {Path(file.stem or 'report')}.html")
    write_text(file, report_files.rendered([_read(path, file.suffix) for path in reports], file))
    print(file)


def _read(path: Path, suffix: str) -> dict[str, Any]:
    """Return the report in a file; raise InputError if it is none, or of a kind that has no page."""
    from ckptavg.errors import InputError
    from ckptavg.filesystem.strict_json import read_json
    from ckptavg.report import schema
    from ckptavg.report.page import KINDS

    try:
        report = read_json(path)
        schema.check(report, path)
    except InputError as error:
        error.hint = error.hint or "ckptavg reads the JSON reports that --report run.json writes"
        raise
    if suffix == ".html" and report["kind"] not in KINDS:
        raise InputError(f"is a report of kind {report['kind']!r}, which has no page", path=path)
    return report
