"""Summary of a GitHub job: the report as Markdown, appended to the file that ``GITHUB_STEP_SUMMARY`` names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ckptavg.errors import printable

VARIABLE: Final = "GITHUB_STEP_SUMMARY"
LIMIT: Final = 1024 * 1024
"""Bytes of a step's summary; GitHub shows nothing of a longer one."""
_CUT: Final = "\nThe rest is longer than a job summary may be: `--report run.md` has it.\n"


def append(report: Mapping[str, Any]) -> str:
    """Append a report, as `ckptavg.report.as_json.to_dict` returns it, to the job's summary, if there is one.

    Returns:
        A warning if that failed: the work is done, and is not lost with it. Else empty.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return ""
    try:
        path = Path(name)
        if path.exists() and not path.is_file():
            return printable(f"{name}: the job summary ({VARIABLE}) is not a regular file")
        size = path.stat().st_size if path.exists() else 0
        text = _fitting(report, LIMIT - size - 1)
        if text is None:
            return f"the job summary has {size:,} bytes already, and no room for this report"
        with path.open("ab+") as file:  # written at its end
            file.seek(-1 if size else 0, os.SEEK_END)
            file.write(b"\n" + text if file.read() not in (b"", b"\n") else text)
    except (OSError, ValueError) as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return printable(f"{name}: the job summary ({VARIABLE}) cannot be written: {message.lower()}")
    return ""


def _fitting(report: Mapping[str, Any], room: int) -> bytes | None:
    """Return the report in at most ``room`` bytes, without its folded part if it has to be; None if nothing fits."""
    from ckptavg.report.markdown import short_summary, summary

    for text in (summary(report), short_summary(report) + _CUT):
        data = f"{text}\n".encode(errors="backslashreplace")
        if len(data) <= room:
            return data
    return None
