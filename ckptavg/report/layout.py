"""Layout for the width of a terminal: names are shortened; figures and intervals are neither cut nor wrapped."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from ckptavg.errors import printable
from ckptavg.report.bars import bars

_GAP: Final = 2  # columns between two columns of a table
_LEAST: Final = 16  # columns that a name keeps before figures move to a further table
_BAR: Final = 24  # columns of the longest bar
_LONGEST: Final = 12  # columns of a part of a heading
# a figure stays beside its interval or its unit
_TOKEN: Final = re.compile(r"[-+]?\d[\d.,]* (?:\[[^\]]*\]\S*|(?:s|kB|MB|GB|bytes)\b\S*)|\[[-+\d., ]*\]\S*|\S+")


@dataclass(frozen=True)
class Sentence:
    """Text that is wrapped between words, but neither within an interval nor between a figure and its unit.

    Lines after the first are indented by ``indent`` columns. On a terminal ``path``, a part of the text, is shortened
    so that one line is enough. ``whole`` leaves words as they are that are longer than a line, such as paths to copy.
    """

    text: str
    style: str = ""
    indent: int = 0
    path: str = ""
    whole: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        text, (lines, start) = self.text, ([""], 0)
        room = options.max_width - cell_len(text) + cell_len(self.path)
        if self.path and options.is_terminal and room >= _LEAST:
            text = text.replace(self.path, _shortened_path(self.path, room), 1)
        for match in _TOKEN.finditer(text):
            (token,) = [match[0]] if self.whole else shortened([match[0]], options.max_width - self.indent)
            longer = f"{lines[-1]}{text[start : match.start()]}{token}"
            start = match.end()
            if cell_len(longer) > options.max_width and lines[-1].strip():
                lines.append(" " * self.indent + token)
            else:
                lines[-1] = longer
        yield Text("\n".join(lines), style=self.style)


@dataclass(frozen=True, kw_only=True)
class FittedTable:
    """A table of names, in its first column, and figures.

    Where it is too wide, its bars are left out, then its headings are wrapped, then what the names have in common and
    columns of equal values are said once above it, then names are shortened in the middle, and at last the columns are
    divided into several tables.

    Attributes:
        title: the line above it.
        left: the headings of further columns of text.
        styles: the style of each row.
        foot: a last row below those.
        bars: the numbers that a last column draws as bars, one for each row; empty without it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    styles: Sequence[str] = ()
    foot: Sequence[str] = ()
    bars: Sequence[float] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        names, columns, said = [printable(row[0]) for row in self.rows], range(1, len(self.headings)), [self.title]
        foot, every = shortened([*self.foot[:1]], _LEAST), [*self.rows, *([self.foot] if self.foot else [])]
        cells = [max([_width(row[i]) for row in every], default=0) for i in range(len(self.headings))]
        widths = [max(cell, cell_len(heading)) for cell, heading in zip(cells, self.headings, strict=True)]

        def room(part: Iterable[int]) -> int:
            return options.max_width - sum(_GAP + widths[i] for i in part)

        longest = max(map(cell_len, [self.headings[0], *foot, *names]))
        spare = room(columns) - longest - _GAP
        drawn = bars(self.bars, min(spare, _BAR)) if self.bars and spare >= _BAR // 3 and not options.ascii_only else []
        if room(columns) < longest:
            pieces = [[cell_len(piece) for _, piece in _pieces(heading)] for heading in self.headings]
            widths = [max(cell, *piece, 0) for cell, piece in zip(cells, pieces, strict=True)]
        if room(columns) < longest:
            names, pattern = without_common_parts(names)
            longest = max(map(cell_len, [self.headings[0], *foot, *names]))
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
        width = max(1, min(map(room, parts)))
        names, foot = shortened(names, width), shortened(foot, width)
        yield from (Sentence(printable(line), style="italic") for line in said if line)
        for part in parts:
            table = self._table(names, part, widths, drawn)
            if self.foot and any(self.foot[i] for i in part):
                table.add_row(Text(foot[0]), *(Text(self.foot[i]) for i in part), style="dim")
            yield table

    def _table(
        self, names: Sequence[str], part: Sequence[int], widths: Sequence[int], drawn: Sequence[Text]
    ) -> Table:  # fmt: skip
        table = Table(box=None, pad_edge=False)
        table.add_column(Text(self.headings[0]), no_wrap=True)
        for i in part:
            justify = "left" if self.headings[i] in self.left else "right"
            table.add_column(Text(_wrapped(self.headings[i], widths[i])), justify=justify, no_wrap=True)
        if drawn:
            table.add_column(no_wrap=True)
        for r, (name, style) in enumerate(zip(names, self.styles or [""] * len(names), strict=True)):
            table.add_row(Text(name), *(Text(self.rows[r][i]) for i in part), *drawn[r : r + 1], style=style or None)
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

    heads = sorted(range(max(1, width)), key=lambda head: abs(head - width // 2))
    ways = ([_cut(name, head, width) for name in names] for head in heads)
    middle = [_cut(name, width // 2, width) for name in names]
    return next((way for way in ways if len(set(way)) == len(set(names))), middle)


def _cut(name: str, head: int, width: int) -> str:
    if cell_len(name) <= width:
        return name
    start, end = _first_cells(name, head), _first_cells(name[::-1], width - 1 - head)[::-1]
    return f"{start}…{end}"


def _shortened_path(path: str, width: int) -> str:
    """Return the path in at most ``width`` columns, with its last part whole where that leaves four others."""
    last = cell_len(path.rpartition("/")[2])
    return _cut(path, min(width // 2, width - last - 2) if last + 6 <= width else width // 2, width)


def _first_cells(text: str, width: int) -> str:
    """Return as many first characters as fit into ``width`` columns; one may take two."""
    ends = accumulate(map(cell_len, text))
    return text[: sum(1 for _ in takewhile(lambda end: end <= width, ends))]


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
