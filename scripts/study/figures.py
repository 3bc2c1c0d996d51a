"""Draw the pictures, if matplotlib is installed."""

from __future__ import annotations

import math
import sys
import textwrap
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from study.setting import Setting
from study.tables import places

OVERVIEW: Final = "overview"
COLOURS: Final = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
ORDINARY: Final = ("constant", "cosine", "wsd")  # these schedules have the same colours everywhere


def draw(found: Sequence[Setting], out: Path) -> list[str]:
    """Write ``overview.svg`` and ``DOMAIN.svg`` for each domain; return the names of what was drawn."""
    if not installed():
        return []
    names = list(dict.fromkeys(one.name for one in found))
    with style():
        for name in names:
            _domain([one for one in found if one.name == name], out / f"{name}.svg")
        real = [one for one in found if one.domain.area]
        if real:
            _overview(real, out / f"{OVERVIEW}.svg")
    return [*names, *([OVERVIEW] if real else [])]


def installed() -> bool:
    """Return whether matplotlib is installed; print how to install it if not."""
    if find_spec("matplotlib") is None:
        print("no figures: matplotlib is not installed (pip install 'ckptavg[plot]')", file=sys.stderr)
        return False
    return True


@contextmanager
def style() -> Generator[None]:
    """Write text as text, and deterministic ids in the file."""
    import matplotlib

    matplotlib.use("svg")
    with matplotlib.rc_context({"svg.hashsalt": "ckptavg", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the layout warns if a label does not fit
        yield


def _overview(found: Sequence[Setting], path: Path) -> None:
    """Draw the mean place of every strategy in every area."""
    from matplotlib.figure import Figure

    by_area = places(found)
    order = sorted(by_area, key=lambda label: fmean(by_area[label].values()))
    areas = list(dict.fromkeys(one.domain.area for one in found))
    cells = [[by_area[label].get(area, math.nan) for area in areas] for label in order]
    cells = [[*row, fmean(by_area[label].values())] for row, label in zip(cells, order, strict=True)]
    figure = Figure(figsize=(9, 0.32 * len(order) + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(cells, aspect="auto", cmap="RdYlBu_r", vmin=1, vmax=len(order))
    axes.set_yticks(range(len(order)), order)
    axes.set_xticks(range(len(areas) + 1), [textwrap.fill(area, 13) for area in (*areas, "mean of the areas")])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for y, row in enumerate(cells):
        for x, place in enumerate(row):
            if not math.isnan(place):
                far = abs(place - (1 + len(order)) / 2) > 0.37 * len(order)  # a dark cell
                colour = "white" if far else "black"
                axes.text(x, y, f"{place:.1f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_title(f"Mean place by test figure among {len(order)} strategies: 1 is the best", fontsize=11)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _domain(mine: Sequence[Setting], path: Path) -> None:
    from matplotlib.figure import Figure

    swept = any(one.ks for one in mine)
    height = 0.24 * len(mine[0].labels) + 1.2
    figure = Figure(figsize=(11 if swept else 8, height), layout="constrained")
    panels = figure.subplots(1, 2 if swept else 1, width_ratios=[3, 2] if swept else None, squeeze=False)[0]
    _differences(panels[0], mine)
    if swept:
        _by_k(panels[1], mine)
    figure.suptitle(mine[0].domain.title)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _colour(one: Setting, nth: int) -> str:
    return COLOURS[ORDINARY.index(one.schedule) if one.schedule in ORDINARY else nth]


def _differences(axes: Any, mine: Sequence[Setting]) -> None:
    """Draw each strategy's test figure minus that of SWA."""
    labels = [label for label in mine[0].labels if label != "SWA"]
    for nth, one in enumerate(mine):
        found = [(row, difference) for row, label in enumerate(labels) if (difference := one.difference(label, "SWA"))]
        axes.errorbar(
            [difference.mean for _, difference in found],
            [row + 0.22 * (nth - (len(mine) - 1) / 2) for row, _ in found],
            xerr=[difference.half or 0 for _, difference in found],
            fmt="o",
            markersize=4,
            color=_colour(one, nth),
            label=one.schedule,
        )
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(axis="y", linewidth=0.3)
    axes.invert_yaxis()
    axes.set_xlabel(f"{mine[0].domain.figure}: difference from SWA, 95 % over seeds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(mine), fontsize=9)


def _by_k(axes: Any, mine: Sequence[Setting]) -> None:
    """Draw the test figures of SeWA and LAWA for every K."""
    for nth, one in enumerate(mine):
        for kind, style in (("SeWA", "-o"), ("LAWA", "--x")):
            figures = [(k, fmean(values)) for k in one.ks if (values := one.swept(kind, k))]
            if figures:
                label = f"{kind}, {one.schedule}"
                axes.plot(*zip(*figures, strict=True), style, color=_colour(one, nth), label=label)
    axes.set_xticks(mine[0].ks)
    axes.set_xlabel("K")
    axes.set_ylabel(mine[0].domain.figure)
    axes.legend(fontsize=9)
