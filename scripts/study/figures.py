"""Draw a figure for each domain, if matplotlib is installed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from study.setting import Setting

COLOURS: Final = {"constant": "tab:blue", "cosine": "tab:orange"}


def draw(found: Sequence[Setting], out: Path) -> list[str]:
    """Write ``DOMAIN.svg`` for each domain; return the names of the domains drawn."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed (pip install 'ckptavg[plot]')", file=sys.stderr)
        return []
    matplotlib.use("svg")
    names = list(dict.fromkeys(one.name for one in found))
    # text as text, and deterministic ids in the file
    with matplotlib.rc_context({"svg.hashsalt": "ckptavg", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tight_layout warns if a label does not fit
        for name in names:
            _figure([one for one in found if one.name == name], out / f"{name}.svg")
    return names


def _figure(mine: Sequence[Setting], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    differences, by_k = figure.subplots(1, 2, width_ratios=[3, 2])
    _differences(differences, mine)
    _by_k(by_k, mine)
    figure.suptitle(mine[0].domain.title)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _differences(axes: Any, mine: Sequence[Setting]) -> None:
    """Draw each strategy's test figure minus that of SWA."""
    labels = [label for label in mine[0].labels if label != "SWA"]
    for nth, one in enumerate(mine):
        for row, label in enumerate(labels):
            difference = one.difference(label, "SWA")
            if difference is None:
                continue
            axes.errorbar(
                difference.mean,
                row + 0.25 * (nth - (len(mine) - 1) / 2),
                xerr=difference.half,
                fmt="o",
                markersize=4,
                color=COLOURS.get(one.schedule),
                label=one.schedule if row == 0 else None,
            )
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"{mine[0].domain.figure}: difference to SWA, 95 % over seeds")
    axes.legend(loc="lower left")


def _by_k(axes: Any, mine: Sequence[Setting]) -> None:
    """Draw the test figures of SeWA and LAWA for every K."""
    for one in mine:
        for kind, style in (("SeWA", "-o"), ("LAWA", "--x")):
            figures = [(k, fmean(values)) for k in one.ks if (values := one.swept(kind, k))]
            if figures:
                axes.plot(
                    *zip(*figures, strict=True), style, color=COLOURS.get(one.schedule), label=f"{kind}, {one.schedule}"
                )
    axes.set_xlabel("K")
    axes.set_ylabel(mine[0].domain.figure)
    axes.legend()
