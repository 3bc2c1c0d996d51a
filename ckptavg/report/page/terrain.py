"""Plots of a landscape, and of the barriers between candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptavg.report.json_values import figures
from ckptavg.report.page.figure import Plot, Table, colour, draw, legend, shortened
from ckptavg.report.page.numbers import Report, data, interval, signed, step


def plots(report: Report, key: str) -> list[Plot]:
    """Return the plane, where it was measured, and the measured losses against the predicted ones."""
    found: list[Plot] = []
    if report.get("plane"):
        found.append(_plane(report["plane"], f"{key}-plane"))
    if report.get("measured"):
        found.append(_predicted(report, f"{key}-predicted"))
    if report.get("basin"):
        found.append(_barriers(report["basin"], f"{key}-basin"))
    return found


def _plane(values: Mapping[str, Any], key: str) -> Plot:
    from ckptavg.report import landscape, picture
    from ckptavg.report.plane import Mark, Plane

    marks: dict[str, Any] = {
        name: [replace(Mark(**mark), name=shortened(mark["name"], 24)) for mark in values[name]]
        for name in ("mixtures", "candidates")
    }
    plane = Plane(**{**values, **marks})
    title = f"Loss on the plane through {', '.join(mark.name for mark in plane.mixtures)}"
    wide, high = plane.x[-1] - plane.x[0], plane.y[-1] - plane.y[0]

    def paint(figure: Any, narrow: bool) -> None:
        picture.paint(figure, plane, pixels=160, narrow=narrow, sizes=(11.0, 9.5))

    best = min(
        (loss, x, y) for y, row in zip(plane.y, plane.losses, strict=True) for x, loss in zip(plane.x, row, strict=True)
    )
    named = "; ".join(f"{mark.name} {signed(mark.loss)}" for mark in plane.mixtures)
    summary = f"Lowest measured loss {signed(best[0])} at ({best[1]:.3g}, {best[2]:.3g}). {named}."
    rows = [[f"{y:.3g}", *(signed(loss) for loss in row)] for y, row in zip(plane.y, plane.losses, strict=True)]
    height, narrow_height = min(720, 200 + 620 * high / wide), min(560, 250 + 300 * high / wide)
    return Plot(
        title=title, summary=summary, note="; ".join(landscape.data(plane)),
        svgs=draw(key, title, summary, paint, height=height, narrow_height=narrow_height),
        table=Table(headings=["y \\ x", *(f"{x:.3g}" for x in plane.x)], rows=rows, title="Measured losses"),
    )  # fmt: skip


def _predicted(report: Report, key: str) -> Plot:
    predicted, measured, title = report["predicted"], report["measured"], "Predicted against measured loss"
    pairs = [(x, y) for x, y in zip(predicted, measured, strict=True) if x is not None and y is not None]
    fit = f"Spearman {signed(report['spearman'])}, R² {signed(report['r_squared'])}"

    def paint(figure: Any, narrow: bool) -> None:
        axes: Any = figure.subplots()
        both = [value for pair in pairs for value in pair] or [0.0, 1.0]
        (line,) = axes.plot((min(both), max(both)), (min(both), max(both)), "--", color=colour("last"), lw=1.2)
        (dots,) = axes.plot([x for x, _ in pairs], [y for _, y in pairs], "o", color=colour("average"), ms=5)
        axes.set(xlabel="loss predicted by the quadratic", ylabel="measured loss")
        legend(figure, narrow, [(dots, "random mixture"), (line, "prediction = measurement")])

    return Plot(
        title=title, summary=f"{len(pairs)} random mixtures: {fit}.", note=f"{fit} on {len(pairs)} random mixtures.",
        svgs=draw(key, title, fit, paint, height=340),
        table=Table(headings=["predicted", "measured"], rows=[[signed(x), signed(y)] for x, y in pairs], title=title),
    )  # fmt: skip


def _barriers(basin: Mapping[str, Any], key: str) -> Plot:
    candidates, middles = basin["candidates"], basin["midpoints"]
    title = f"Barriers: {basin['name']} of candidates and of midpoints between them, {data(basin['scored_on'])}"

    def value(score: Any) -> float | None:
        return next((number for number, _ in figures(score).values()), None)

    def paint(figure: Any, narrow: bool) -> None:
        axes: Any = figure.subplots()
        entries: dict[str, Any] = {}
        for middle in middles:
            a, b = middle["candidates"]
            y = [value(candidates[a]["score"]), value(middle["score"]), value(candidates[b]["score"])]
            if None in y:
                continue
            x = [a, (a + b) / 2, b]
            kind = "barrier" if middle["separates"] else "no barrier"
            shade = colour("best" if middle["separates"] else "average")
            ls = "--" if middle["separates"] else "-"
            axes.plot(x, y, ls, color=shade, lw=1.4)
            (entries[f"midpoint, {kind}"],) = axes.plot(
                x[1], y[1], "X" if middle["separates"] else "s", color=shade, ms=7
            )
        points = [(i, value(c["score"])) for i, c in enumerate(candidates) if value(c["score"]) is not None]
        if points:
            (entries["candidate"],) = axes.plot(*zip(*points, strict=True), "o", color=colour("ink"), ms=5, zorder=4)
        every = max(1, -(-len(candidates) // (4 if narrow else 9)))
        axes.set_xticks(range(0, len(candidates), every), [step(c["step"]) for c in candidates[::every]])
        axes.set(xlabel="training step of the candidate", ylabel=basin["name"])
        axes.grid(visible=False, axis="x")
        legend(figure, narrow, [(handle, name) for name, handle in entries.items()])

    rows = [
        [f"{step(m['steps'][0])} and {step(m['steps'][1])}", signed(value(m["score"])),
         interval(m["barrier"]) if m["barrier"] else "", "barrier" if m["separates"] else "harms" if m["harms"] else ""]
        for m in middles
    ]  # fmt: skip
    count = sum(m["separates"] for m in middles)
    summary = f"{count} of {len(middles)} midpoints are behind a barrier."
    headings = ["between steps", basin["name"], "height of the barrier", ""]
    return Plot(
        title=title, summary=summary, svgs=draw(key, title, summary, paint, height=340),
        table=Table(headings=headings, rows=rows, title="Midpoints"),
    )  # fmt: skip
