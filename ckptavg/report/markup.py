"""Markdown of untrusted text: nothing in a name or a message becomes markup, HTML, a table cell or a further line."""

import re
from collections.abc import Sequence

from ckptavg.errors import printable

_MARKUP = re.compile(r"([\\`*_\[\]|~$#])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escaped(text: str) -> str:
    """Return ``text`` on one line, to be shown as it is in a paragraph, a list or a table."""
    line = _MARKUP.sub(r"\\\1", printable(text))
    line = "".join(_ENTITIES.get(char, char) for char in line)
    return f"\\{line}" if line[:1] in ("+", "-", "=") else line


def code(text: str, *, cell: bool = False) -> str:
    """Return ``text`` on one line as a code span; in a ``cell`` of a table a pipe needs a backslash even there."""
    line = printable(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    span = f"{fence}{pad}{line}{pad}{fence}"
    return span.replace("|", "\\|") if cell else span


def block(text: str, language: str = "") -> str:
    """Return ``text`` as a block of code."""
    lines = [printable(line) for line in text.splitlines()]
    fence = "`" * max(3, 1 + max((len(run) for line in lines for run in re.findall("`+", line)), default=0))
    return "\n".join([f"{fence}{language}", *lines, fence])


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table of cells that are Markdown already; the first ``left`` columns are texts, others numbers."""
    rules = [":--" if column < left else "--:" for column in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows))


def details(summary: str, body: str) -> str:
    """Return a part that is folded; GitHub shows ``body`` as Markdown because of the empty lines around it."""
    title = "".join(_ENTITIES.get(char, char) for char in printable(summary))
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
