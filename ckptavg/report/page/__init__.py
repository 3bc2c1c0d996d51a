"""The report as one self-contained HTML page."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ckptavg.errors import UsageError

KINDS: Final = ("average", "comparison", "posterior", "landscape", "evaluation", "inspection")
"""The kinds of reports that have a page."""


def check_installed() -> None:
    """Raise UsageError if a package that draws the page is not installed."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"a report in HTML needs {' and '.join(missing)}", hint="pip install 'ckptavg[plot]'")


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of one report, or of several side by side, as values of JSON.

    It has no clock and no random numbers in it: the same reports give the same bytes.
    """
    check_installed()
    from ckptavg.report.page.document import document

    return document(reports)
