"""Plots of a comparison: differences to the last candidate with intervals, and cost against gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptavg.report.json_values import figures
from ckptavg.report.page.figure import Plot, Table, colour, draw, legend, logarithmic, shortened
from ckptavg.report.page.numbers import Report, data, interval, seconds, signed, with_noise


def plots(report: Report, key: str) -> list[Plot]:
    """Return both plots; none for a dry run."""
    rows = report.get("strategies", [])
    if len(rows) < 2:
        return []
    return [_forest(report, rows, f"{key}-forest"), _cost(report, rows, f"{key}-cost")]


def judged_on(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the split of the difference that counts: test data if there are any."""
    return list(rows[0]["over_last"])[-1]


def ranked(report: Report) -> list[Mapping[str, Any]]:
    """Return the rows, the winner first, then by difference to the last candidate."""
    rows = report["strategies"]
    split = judged_on(rows)
    worst = float("-inf")

    def order(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = row["over_last"][split]["value"]
        return row["name"] != report["winner"], -(worst if value is None else value)

    return sorted(rows, key=order)


def table(report: Report) -> Table:
    """Return the strategies as a table: what they chose on, their scores, difference, candidates and cost."""
    rows, split = ranked(report), judged_on(report["strategies"])
    columns = list(
        dict.fromkeys((s, name) for row in rows for s, score in row["scores"].items() for name in figures(score))
    )
    held = any(row.get("held_out") is not None and row.get("chose_on") for row in rows)
    headings = [
        "strategy",
        f"difference to last, {data(split)} [95 % interval]",
        *(f"{s} {name}" for s, name in columns),
    ]
    headings += [*["held-out loss"] * held, "candidates used", "chose on", "cost", "time"]
    cells: list[list[str]] = []
    for row in rows:
        scores = [figures(row["scores"].get(s)).get(name, (None, None)) for s, name in columns]
        cost = row["cost"]
        spent = f"{cost['passes']:,.0f} passes" if cost.get("passes") is not None else f"{cost['evaluations']:,} scores"
        gain = "reference" if row["name"] == "last" else _words(row["over_last"][split])
        cells.append([
            f"★ {row['name']}" if row["name"] == report["winner"] else row["name"], gain,
            *(with_noise(*score) for score in scores), *[signed(row.get("held_out"))] * held, f"{row['used']:,}",
            row.get("chose_on") or "nothing", spent, seconds(cost),
        ])  # fmt: skip
    return Table(headings=headings, rows=cells, title="All strategies; ★ won")


def _words(gain: Mapping[str, Any]) -> str:
    return interval(gain) + (f" ({gain['reason']})" if gain.get("low") is None and gain.get("reason") else "")


def _forest(report: Report, rows: Sequence[Mapping[str, Any]], key: str) -> Plot:
    split = judged_on(rows)
    shown = [r for r in ranked(report) if r["name"] != "last" and r["over_last"][split]["value"] is not None]
    evidence = split == "test"
    title = f"Difference to the last candidate, {data(split)}"

    def paint(figure: Any, narrow: bool) -> None:
        from matplotlib.ticker import MaxNLocator

        axes: Any = figure.subplots()
        for i, row in enumerate(shown):
            gain, won = row["over_last"][split], row["name"] == report["winner"]
            shade = colour("average") if won else colour("soft")
            if evidence and gain["low"] is not None:
                axes.plot(
                    (gain["low"], gain["high"]), (i, i), "-", color=shade, lw=3 if won else 1.8, solid_capstyle="butt"
                )
            face = shade if evidence and gain["separated"] else colour("paper")
            axes.plot(gain["value"], i, "D" if won else "o", ms=8 if won else 6, mfc=face, mec=shade, mew=1.6, zorder=4)
        axes.axvline(0, color=colour("ink"), lw=1.2)
        names = [
            ("★ " if row["name"] == report["winner"] else "") + shortened(row["name"], 22 if narrow else 36)
            for row in shown
        ]
        axes.set_yticks(range(len(shown)), names)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
        axes.set_xlabel("← worse | better →" if narrow else "← worse than the last candidate | better →")

    parts = [f"{row['name']} {interval(row['over_last'][split])}" for row in shown]
    note = "Lines are 95 % intervals; a filled mark: the interval excludes zero." if evidence else ""
    note += "" if evidence else "No intervals: strategies chose on these data, so the differences are no evidence."
    height = 80 + 26 * max(2, len(shown))
    return Plot(
        title=title,
        summary=f"{title}: {'; '.join(parts)}.",
        note=note,
        svgs=draw(key, title, "; ".join(parts), paint, height=height),
    )


def _cost(report: Report, rows: Sequence[Mapping[str, Any]], key: str) -> Plot:
    split, unit = judged_on(rows), "scored mixtures"
    name = "evaluations"
    if all(row["cost"].get("passes") is not None for row in rows):
        name, unit = "passes", f"passes over the {data(rows[0]['cost']['passes_over'])}"
    points = [
        (i, row, max(row["cost"][name], 0.5), row["over_last"][split]["value"])
        for i, row in enumerate(ranked(report), 1) if row["over_last"][split]["value"] is not None
    ]  # fmt: skip
    title = "Cost against gain"

    def paint(figure: Any, narrow: bool) -> None:
        axes: Any = figure.subplots()
        placed = _apart([(x, y) for _, _, x, y in points], narrow)
        for (number, row, x, y), offset in zip(points, placed, strict=True):
            won = row["name"] == report["winner"]
            shade = colour("average" if won else "soft")
            axes.plot(
                x,
                y,
                "D" if won else "o",
                color=shade,
                ms=8 if won else 6,
                mfc=shade if won else colour("paper"),
                mew=1.6,
            )
            axes.annotate(
                str(number), (x, y), offset, textcoords="offset points", va="center", ha="center", color=shade
            )
        axes.axhline(0, color=colour("ink"), lw=1)
        axes.set_xscale("log")
        axes.margins(x=0.12, y=0.12)
        logarithmic(axes.xaxis)
        axes.set(xlabel=f"cost: {unit}", ylabel="difference to last")
        handles = [_number(number) for number, *_ in points]
        legend(
            figure, narrow, list(zip(handles, [shortened(f"{n} {r['name']}", 24) for n, r, *_ in points], strict=True))
        )

    parts = [f"{number} {row['name']}: {x:,.0f}, {signed(y, '+')}" for number, row, x, y in points]
    lines = -(-len(points) // 2)
    svgs = draw(key, title, f"Cost and difference: {'; '.join(parts)}.", paint,
                height=300 + 16 * -(-len(points) // 4), narrow_height=280 + 16 * lines)  # fmt: skip
    note = "Top left is best: a large gain for little. A backward pass counts as two passes."
    return Plot(title=title, summary="; ".join(parts), svgs=svgs, note=note)


def _number(number: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], ls="none", label=str(number))


def _apart(points: Sequence[tuple[float, float]], narrow: bool) -> list[tuple[float, float]]:
    """Return offsets of the labels so that those of neighbouring points do not cover each other."""
    import math

    if not points:
        return []
    xs, ys = [math.log10(x) for x, _ in points], [y for _, y in points]
    wide, high = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1
    across, up = (240, 190) if narrow else (560, 210)
    placed: list[tuple[float, float]] = []
    result: list[tuple[float, float]] = []
    marks = [((x - min(xs)) / wide * across, (y - min(ys)) / high * up) for x, y in zip(xs, ys, strict=True)]
    around = [(12, 0), (-12, 0), (0, 13), (0, -13), (12, 13), (-12, 13), (12, -13), (-12, -13)]
    around += [(24, 0), (-24, 0), (24, 13), (-24, 13), (24, -13), (-24, -13), (0, 26), (0, -26), (36, 0), (-36, 0)]
    for x, y in marks:

        def free(offset: tuple[float, float], x: float = x, y: float = y) -> bool:
            at = (x + offset[0], y + offset[1])
            near = [other for other in placed if abs(other[0] - at[0]) < 17 and abs(other[1] - at[1]) < 14]
            return not near and not any(abs(a - at[0]) < 9 and abs(b - at[1]) < 9 for a, b in marks)

        offset = next((o for o in around if free(o)), around[0])
        placed.append((x + offset[0], y + offset[1]))
        result.append(offset)
    return result
