"""Layout for the width of a terminal: names are shortened; figures and intervals are neither cut nor wrapped."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from ckptavg.errors import printable

_GAP: Final = 2  # columns between two columns of a table
_LEAST: Final = 16  # columns that a name keeps before figures move to a further table
_LONGEST: Final = 12  # columns of a part of a heading
# a figure stays beside its interval or its unit
_TOKEN: Final = re.compile(r"[-+]?\d[\d.,]* (?:\[[^\]]*\]\S*|(?:s|kB|MB|GB|bytes)\b\S*)|\[[-+\d., ]*\]\S*|\S+")


@dataclass(frozen=True)
class Sentence:
    """Text that is wrapped between words, but neither within an interval nor between a figure and its unit.

    Lines after the first are indented by ``indent`` columns.
    """

    text: str
    style: str = ""
    indent: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        lines, start = [""], 0
        for match in _TOKEN.finditer(self.text):
            (token,) = shortened([match[0]], options.max_width - self.indent)
            longer = f"{lines[-1]}{self.text[start : match.start()]}{token}"
            start = match.end()
            if cell_len(longer) > options.max_width and lines[-1].strip():
                lines.append(" " * self.indent + token)
            else:
                lines[-1] = longer
        yield Text("\n".join(lines), style=self.style)


@dataclass(frozen=True, kw_only=True)
class FittedTable:
    """A table of names, in its first column, and figures.

    Where it is too wide, its headings are wrapped, then what the names have in common and columns of equal values are
    said once above it, then names are shortened in the middle, and at last the columns are divided into several tables.

    Attributes:
        title: the line above it.
        left: the headings of further columns of text.
        styles: the style of each row.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    styles: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        names, columns, said = [printable(row[0]) for row in self.rows], range(1, len(self.headings)), [self.title]
        cells = [
            max(_width(row[i]) for row in (*self.rows, [""] * len(self.headings))) for i in range(len(columns) + 1)
        ]
        widths = [max(cell, cell_len(heading)) for cell, heading in zip(cells, self.headings, strict=True)]

        def room(part: Iterable[int]) -> int:
            return options.max_width - sum(_GAP + widths[i] for i in part)

        longest = max(map(cell_len, [self.headings[0], *names]))
        if room(columns) < longest:
            pieces = [[cell_len(piece) for _, piece in _pieces(heading)] for heading in self.headings]
            widths = [max(cell, *piece, 0) for cell, piece in zip(cells, pieces, strict=True)]
        if room(columns) < longest:
            names, pattern = without_common_parts(names)
            longest = max(map(cell_len, [self.headings[0], *names]))
            said = [": ".join(filter(None, [self.title or "names", pattern]))] if pattern else said
        if room(columns) < longest and len(self.rows) > 1:
            equal = [i for i in columns if self.rows[0][i] and len({row[i] for row in self.rows}) == 1]
            columns = [i for i in columns if i not in equal]
            said += [f"all: {', '.join(f'{self.headings[i]} {self.rows[0][i]}' for i in equal)}"] if equal else []
        parts: list[list[int]] = [[]]
        for i in columns:
            if parts[-1] and room([*parts[-1], i]) < min(longest, _LEAST):
                parts.append([])
            parts[-1].append(i)
        names = shortened(names, max(1, min(map(room, parts))))
        yield from (Sentence(printable(line), style="italic") for line in said if line)
        for part in parts:
            yield self._table(names, part, widths)

    def _table(self, names: Sequence[str], part: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column(Text(self.headings[0]), no_wrap=True)
        for i in part:
            justify = "left" if self.headings[i] in self.left else "right"
            table.add_column(Text(_wrapped(self.headings[i], widths[i])), justify=justify, no_wrap=True)
        for name, row, style in zip(names, self.rows, self.styles or [""] * len(names), strict=True):
            table.add_row(Text(name), *(Text(row[i]) for i in part), style=style or None)
        return table


def without_common_parts(names: Sequence[str]) -> tuple[list[str], str]:
    """Return the names without their common start and ending, and a glob of these; "" if they have none in common.

    The start ends at one of ``/ = _ -``, and the ending begins at a ``/`` or at a file's suffix, so that no number is
    divided.
    """
    if len(set(names)) < 2:
        return list(names), ""
    found = re.match(r".*[/=_-]", _common_start(names))
    start = found[0] if found else ""
    rests = [name[len(start) :] for name in names]
    found = re.search(r"(/|\.(?=[A-Za-z])).*", _common_start([rest[::-1] for rest in rests])[::-1])
    ending = found[0] if found and all(len(rest) > len(found[0]) for rest in rests) else ""
    return [rest[: len(rest) - len(ending)] for rest in rests], f"{start}*{ending}" if start or ending else ""


def _common_start(texts: Sequence[str]) -> str:
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Return the names in at most ``width`` columns each, different ones as different texts where possible."""

    def cut(name: str, head: int) -> str:
        tail = width - 1 - head
        return name if cell_len(name) <= width else f"{name[:head]}…{name[len(name) - tail :]}"

    heads = sorted(range(max(1, width)), key=lambda head: abs(head - width // 2))
    ways = ([cut(name, head) for name in names] for head in heads)
    return next((way for way in ways if len(set(way)) == len(set(names))), [cut(name, width // 2) for name in names])


def _width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))


def _pieces(heading: str) -> list[tuple[str, str]]:
    """Return the parts between which a heading may be wrapped, each with what joins it to the part before."""
    pieces: list[tuple[str, str]] = []
    for word in heading.split():
        parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=_)(?=\w)", "\n", word).split("\n") if len(word) > 8 else [word]
        parts = [part[i : i + _LONGEST] for part in parts for i in range(0, len(part), _LONGEST)]
        pieces += [("" if i else " ", part) for i, part in enumerate(parts)]
    return pieces


def _wrapped(heading: str, width: int) -> str:
    lines = [""]
    for joint, piece in _pieces(heading):
        longer = f"{lines[-1]}{joint if lines[-1] else ''}{piece}"
        if cell_len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(piece)
    return "\n".join(lines)
