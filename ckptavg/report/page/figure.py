"""Plots as inline SVG: text stays text, colours are CSS variables, and each has a version for a narrow screen."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.sax.saxutils import escape

from ckptavg.errors import printable

COLOURS: Final = ("ink", "soft", "rule", "paper", "average", "best", "last", "swa", "other")
"""CSS variables of a plot, `style.css` sets them for light and dark pages."""

_SENTINELS: Final = {name: f"#0{number}f{number}e{number}" for number, name in enumerate(COLOURS, 1)}
_WIDTHS: Final = {"narrow": 360, "wide": 760}  # CSS pixels
_SETTINGS: Final[dict[str, Any]] = {
    "svg.fonttype": "none", "svg.hashsalt": "ckptavg", "svg.image_inline": True, "text.parse_math": False,
    "font.family": ["DejaVu Sans"], "figure.dpi": 72, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "text.color": _SENTINELS["ink"], "axes.edgecolor": _SENTINELS["soft"],
    "axes.labelcolor": _SENTINELS["ink"], "xtick.color": _SENTINELS["soft"], "ytick.color": _SENTINELS["soft"],
    "xtick.labelcolor": _SENTINELS["ink"], "ytick.labelcolor": _SENTINELS["ink"], "axes.grid": True,
    "grid.color": _SENTINELS["rule"], "grid.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "legend.frameon": False, "axes.unicode_minus": True, "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers behind a plot, or a table of its own; `headings` name the columns."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure of the page.

    Attributes:
        title: its heading.
        summary: alternative text: what the plot shows, in words and numbers.
        svgs: the SVG elements for a narrow and for a wide screen.
        note: how to read it.
        table: the same numbers; None if another table of the page has them.
    """

    title: str
    summary: str
    svgs: Sequence[str]
    note: str = ""
    table: Table | None = None


def colour(name: str) -> str:
    """Return the colour that stands for the CSS variable ``--name``."""
    return _SENTINELS[name]


def draw(
    key: str, title: str, summary: str, paint: Callable[[Any, bool], None], *, height: float = 300,
    narrow_height: float | None = None,
) -> tuple[str, str]:  # fmt: skip
    """Return the SVG elements for a narrow and a wide screen.

    Args:
        key: unique in the page; the ids start with it.
        paint: draws into a matplotlib figure; its second argument is whether the screen is narrow.
        height: in CSS pixels, of a narrow screen `narrow_height` if that is given.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    title, summary, images = printable(title), printable(summary), list[str]()
    for screen, width in _WIDTHS.items():
        narrow = screen == "narrow"
        size = 11.0 if narrow else 12.5
        high = (narrow_height or height) if narrow else height
        sizes: dict[str, Any] = {
            "font.size": size,
            "axes.titlesize": size,
            "legend.fontsize": size,
            "axes.labelsize": size,
        }
        sizes |= {"xtick.labelsize": size, "ytick.labelsize": size}
        settings: Any = {**_SETTINGS, **sizes}
        with rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has other fonts
            figure = Figure(figsize=(width / 72, high / 72))
            FigureCanvasSVG(figure)
            paint(figure, narrow)
            file = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", dpi=72, metadata=nothing)
        images.append(_inline(file.getvalue(), f"{key}-{screen}", screen, title, summary))
    return images[0], images[1]


def legend(figure: Any, narrow: bool, entries: Sequence[tuple[Any, str]], columns: int = 4) -> None:
    """Draw one legend below the plot, in fewer columns on a narrow screen, unless there is nothing to tell apart."""
    if entries:
        handles, labels = zip(*entries, strict=True)
        columns = min(max(1, columns // 2) if narrow else columns, len(entries))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=2.2)


def logarithmic(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 times powers of ten where that is few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 3) if low > 0 and high / low < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def shortened(text: str, most: int) -> str:
    """Return a name on one line of at most ``most`` characters, without its middle if it is longer."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def _inline(svg: str, key: str, screen: str, title: str, summary: str) -> str:
    """Return an SVG file of matplotlib as an element of a page: own ids, CSS variables, an accessible name."""
    body = svg[svg.index("<defs>") : svg.rindex("</svg>")]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", body)
    body = body.replace("xlink:href", "href")
    for name, sentinel in _SENTINELS.items():
        body = body.replace(sentinel, f"var(--{name})")
    body = body.replace("'DejaVu Sans'", "var(--plot-font)")
    body = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL))
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    wide, high = (round(float(number)) for number in box[1].split()[2:])
    return (
        f'<svg class="plot {screen}" viewBox="{box[1]}" width="{wide}" height="{high}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-desc">{escape(summary)}</desc>\n{body}</svg>'
    )
