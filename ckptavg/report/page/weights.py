"""Plots of the coefficients: bars, or a heat map where groups of tensors have their own."""

from __future__ import annotations

from typing import Any, Final

from ckptavg.report.json_values import coefficients
from ckptavg.report.page.figure import Plot, Table, colour, draw, legend, shortened
from ckptavg.report.page.numbers import Report, signed, step, steps

_MOST_CELLS: Final = 20_000  # of a table


def plots(report: Report, key: str) -> list[Plot]:
    """Return the plot of the coefficients by candidate; none if nothing was averaged."""
    candidates = report.get("candidates", [])
    if report.get("output") is None or not any(any(coefficients(c)) for c in candidates):
        return []
    return [_heat_map(report, key) if len(report["groups"]) > 1 else _bars(report, key)]


def _bars(report: Report, key: str) -> Plot:
    candidates, title = report["candidates"], "Coefficient of every candidate"
    values = [coefficients(c)[0] for c in candidates]
    n, used = len(values), [c["step"] for c, value in zip(candidates, values, strict=True) if value]

    def paint(figure: Any, narrow: bool) -> None:
        from matplotlib.ticker import MaxNLocator

        axes: Any = figure.subplots()
        positive = [max(value, 0.0) for value in values]
        negative = [min(value, 0.0) for value in values]
        up = axes.bar(range(n), positive, width=0.8, color=colour("average"))
        entries: list[tuple[Any, str]] = []
        if any(negative):
            down = axes.bar(
                range(n), negative, width=0.8, color=colour("paper"), edgecolor=colour("best"),
                hatch="////" if n <= 60 else None, lw=1,
            )  # fmt: skip
            axes.axhline(0, color=colour("soft"), lw=1)
            entries = [(up, "positive"), (down, "negative (hatched)" if n <= 60 else "negative (outlined)")]
        axes.set_ylabel("coefficient")
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _by_step(axes, candidates, narrow)
        legend(figure, narrow, entries)

    total = sum(values)
    summary = f"{len(used)} of {n} candidates have a coefficient other than 0, from {signed(min(values))} to "
    summary += f"{signed(max(values))}; their sum is {signed(total)}. Steps: {steps(used, 12)}."
    svgs = draw(key, title, summary, paint, height=260)
    effective = report.get("effective")
    note = f"Effective number of candidates 1/Σβ²: {effective:.1f}." if effective else ""
    return Plot(title=title, summary=summary, svgs=svgs, note=note)


def _heat_map(report: Report, key: str) -> Plot:
    candidates, groups = report["candidates"], [", ".join(names) or "all tensors" for names in report["groups"]]
    rows = [list(row) for row in zip(*map(coefficients, candidates), strict=True)]
    most = max(abs(value) for row in rows for value in row)
    title = "Coefficients by group of tensors"

    def paint(figure: Any, narrow: bool) -> None:
        axes: Any = figure.subplots()
        image = axes.imshow(
            rows, aspect="auto", interpolation="none", cmap="PuOr", vmin=-most, vmax=most,
            extent=(-0.5, len(candidates) - 0.5, len(groups) - 0.5, -0.5),
        )  # fmt: skip
        axes.grid(visible=False)
        every = max(1, -(-len(groups) // 20))
        shown = range(0, len(groups), every)
        axes.set_yticks(shown, [shortened(groups[i], 16 if narrow else 40) for i in shown])
        _by_step(axes, candidates, narrow)
        bar = figure.colorbar(image, location="bottom", aspect=40, label="coefficient")
        bar.ax.grid(visible=False)

    low, high = min(map(min, rows)), max(map(max, rows))
    summary = f"Heat map of {len(groups)} groups of tensors by {len(candidates)} candidates: coefficients from "
    summary += f"{signed(low)} to {signed(high)}."
    height = 150 + 18 * min(len(groups), 20)
    svgs = draw(key, title, summary, paint, height=max(height, 240), narrow_height=max(height, 260))
    return Plot(
        title=title, summary=summary, svgs=svgs, table=_table(report, groups, rows),
        note="A row is a group of tensors, top to bottom in the model's order; orange is negative, purple positive.",
    )  # fmt: skip


def _table(report: Report, groups: list[str], rows: list[list[float]]) -> Table:
    if sum(map(len, rows)) <= _MOST_CELLS:
        headings = ["tensors", *(step(c["step"]) for c in report["candidates"])]
        cells = [[name, *(f"{value:.3f}" for value in row)] for name, row in zip(groups, rows, strict=True)]
        return Table(headings=headings, rows=cells, title="Coefficients by group of tensors and step")
    cells = [
        [name, f"{min(row):.3f}", f"{max(row):.3f}", f"{sum(map(bool, row)):,}"]
        for name, row in zip(groups, rows, strict=True)
    ]
    headings = ["tensors", "least", "greatest", "candidates used"]
    return Table(headings=headings, rows=cells, title="Coefficients by group of tensors")


def _by_step(axes: Any, candidates: list[Any], narrow: bool) -> None:
    """Label the horizontal axis, on which candidates are equally spaced, with their steps."""
    n = len(candidates)
    every = max(1, -(-n // (4 if narrow else 9)))
    shown = range((n - 1) % every, n, every)
    axes.set_xticks(shown, [step(candidates[i]["step"]) for i in shown])
    axes.set_xlim(-0.7, n - 0.3)
    axes.set_xlabel("training step of the candidate")
