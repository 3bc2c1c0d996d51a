"""Plot of every candidate's score by training step, with the average and its rivals as lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ckptavg.report.json_values import coefficients, figures
from ckptavg.report.page.figure import Plot, colour, draw, legend
from ckptavg.report.page.numbers import Report, data, signed, step, with_noise

_LINES: Final = {
    "average": ("average", "-", 2.2),
    "best": ("best", (0, (6, 2)), 1.6),
    "last": ("last", (0, (2, 2)), 1.6),
    "swa": ("swa", (0, (8, 2, 2, 2)), 1.6),
}
_BARS: Final = 80  # candidates whose standard errors are drawn


def rivals(report: Report) -> dict[str, Mapping[str, Any]]:
    """Return name → scores by split of the written file (``average``) and of ``best``, ``last`` and ``swa``."""
    rows = {row["name"]: row["scores"] for row in report.get("strategies", ())}
    others = {**rows, **report.get("baselines", {})}
    found = {name: others[name] for name in ("best", "last", "swa") if name in others}
    return {"average": report["scores"], **found} if report.get("scores") else {}


def plots(report: Report, key: str) -> list[Plot]:
    """Return the plot, a panel for the deciding metric and one for the loss; none if nothing was scored."""
    split = report.get("scored_on", "val")
    candidates = [c for c in report.get("candidates", ()) if figures(c.get("score"))]
    lines = {name: figures(scores.get(split)) for name, scores in rivals(report).items()}
    panels = list(dict.fromkeys([name for c in candidates for name in figures(c["score"])][:2]))
    panels = panels or list(lines.get("average", ()))[:2]
    if not panels or not (candidates or lines):
        return []
    title = f"Score of every candidate by training step, {data(split)}"
    return [_plot(report, key, title, candidates, lines, panels)]


def _plot(
    report: Report, key: str, title: str, candidates: list[Any], lines: Mapping[str, Any], panels: list[str]
) -> Plot:
    first, written = panels[0], report.get("output") is not None
    chosen = [c for c in candidates if written and any(coefficients(c))]
    rest = [c for c in candidates if c not in chosen]

    def paint(figure: Any, narrow: bool) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        every: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        entries: dict[str, Any] = {}
        for name, axes in zip(panels, every[:, 0], strict=True):
            for label, group, filled in (("candidate", rest, False), ("averaged candidate", chosen, True)):
                points = [(c["step"], *figures(c["score"])[name]) for c in group if name in figures(c["score"])]
                if not points:
                    continue
                x, y, noise = zip(*points, strict=True)
                face = colour("average") if filled else colour("paper")
                if len(candidates) <= _BARS and all(n is not None for n in noise):
                    axes.errorbar(x, y, noise, fmt="none", ecolor=colour("soft"), elinewidth=0.7, zorder=2)
                style = {"ls": "none", "mfc": face, "mec": colour("average"), "mew": 1.2, "zorder": 3}
                (entries[label],) = axes.plot(x, y, "o", ms=5.5 if len(candidates) < 100 else 3.5, **style)
            for rival, values in lines.items():
                if name in values:
                    shade, dashes, wide = _LINES[rival]
                    entries[rival] = axes.axhline(
                        values[name][0], color=colour(shade), ls=dashes, lw=wide, zorder=4 if rival == "average" else 1
                    )
            axes.set_ylabel(f"{_short(name)}{' (lower is better)' if name == 'loss' and not narrow else ''}")
            axes.yaxis.set_major_locator(MaxNLocator(5))
        every[-1, 0].xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
        every[-1, 0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: step(round(x))))
        every[-1, 0].set_xlabel("training step")
        names = {"average": _written(report), "best": "best single", "last": "last", "swa": "SWA"}
        labels = [(handle, names.get(name, name)) for name, handle in entries.items()]
        legend(figure, narrow, labels, columns=6 if len(labels) > 4 else 4)

    summary = _summary(first, candidates, lines)
    height = 190 + 150 * len(panels)
    svgs = draw(key, title, summary, paint, height=height, narrow_height=height + 60)
    bars = "Bars are standard errors." if len(candidates) <= _BARS else ""
    note = f"Filled: candidates in the average. {bars}" if chosen else bars
    invalid = sum(bool((c.get("score") or {}).get("invalid")) for c in report.get("candidates", ()))
    note += f" {invalid:,} without a valid score are not shown." if invalid else ""
    return Plot(title=title, summary=summary, svgs=svgs, note=note.strip())


def _written(report: Report) -> str:
    return "written: best single" if report.get("replaced") else "average"


def _short(name: str) -> str:
    from ckptavg.report.page.figure import shortened

    return shortened(name, 24)


def _summary(name: str, candidates: list[Any], lines: Mapping[str, Any]) -> str:
    known = [figures(c["score"]).get(name, (None, None))[0] for c in candidates]
    values = [value for value in known if value is not None]
    parts = (
        [f"{len(values)} candidates have {name} from {signed(min(values))} to {signed(max(values))}"] if values else []
    )
    parts += [f"{rival}: {with_noise(*figs[name])}" for rival, figs in lines.items() if name in figs]
    return "; ".join(parts) + "."
