"""The report as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of one report, or of several side by side, as values of JSON."""
    raise NotImplementedError
