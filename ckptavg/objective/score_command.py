"""Parse the score that a command printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

FILE: Final = "{}"
DIRECTORY: Final = "{dir}"
_NUMBER: Final = re.compile(
    r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])|(?<!\w)[-+]?(?:nan|inf)(?!\w)"
)
_SHOWN: Final = 10  # lines of a failed command's output that the error shows


def numbers(text: str) -> Iterator[float]:
    """Yield every number in ``text``, in order."""
    return (float(match.group()) for match in _NUMBER.finditer(text))


def entries(text: str, key: str) -> Iterator[float]:
    """Yield the numbers at ``key`` in the lines of ``text`` that are JSON objects."""
    for line in text.splitlines():
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue
        number = _at(value, key)
        if isinstance(number, int | float) and not isinstance(number, bool):
            yield float(number)


def _at(value: Any, key: str) -> Any:
    if not isinstance(value, dict) or key in value or "." not in key:
        return value.get(key) if isinstance(value, dict) else None
    head, _, rest = key.partition(".")
    return _at(value.get(head), rest)


def tail(text: str) -> str:
    """Join the last lines of ``text`` into one, for an error message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_SHOWN:]) or "no output"
