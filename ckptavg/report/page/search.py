"""Plots of a search: probabilities of a mask, a walk, losses of a training, sizes and shrinkage of a quadratic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ckptavg.report.json_values import coefficients
from ckptavg.report.page.figure import Plot, Table, colour, draw, legend, logarithmic
from ckptavg.report.page.numbers import Report, cell, data, signed, step

_DECISIONS: Final = {"start": ("o", "average", "start"), "soft": ("o", "average", "accepted"),
                     "hard": ("*", "best", "restart (hard)"), "reject": ("x", "last", "rejected")}  # fmt: skip
_LOSSES: Final[Mapping[str, str]] = {
    "quadratic": "on the quadratic", "held-out": "held-out, cross-validated", "loss": "measured loss",
}  # fmt: skip
Row = Mapping[str, Any]
_SHADES: Final = (("average", "-"), ("best", (0, (6, 2))), ("swa", (0, (2, 2))), ("other", (0, (8, 2, 2, 2))))


def plots(report: Report, key: str) -> list[Plot]:
    """Return the plots of what the strategy recorded, in the order of its work."""
    trace, named = report.get("trace", {}), report.get("tables", {})
    found = [
        _probabilities(report, f"{key}-s") if trace.get("s") else None,
        _walk(report, f"{key}-walk") if any("decision" in c for c in report.get("candidates", ())) else None,
        _losses(report, f"{key}-loss") if trace.get("loss") else None,
        _best_score(report, f"{key}-evaluations") if trace.get("best_score") else None,
        *(
            _by_column(title, rows, f"{key}-table-{i}")
            for i, (title, rows) in enumerate(named.items())
            if rows and _curves(rows)
        ),
    ]
    return [plot for plot in found if plot is not None]


def _probabilities(report: Report, key: str) -> Plot:
    trace, candidates = report["trace"], report["candidates"]
    at, rows = trace["s_step"], trace["s"]
    title = "SeWA: probability of each candidate during the search"
    chosen = [i for i, c in enumerate(candidates) if any(coefficients(c))]
    n = len(candidates)
    likeliest = sorted(range(n), key=lambda i: rows[-1][i], reverse=True)[: len(chosen)]
    note = "Triangles on the right mark the candidates that were averaged."
    if {*likeliest} != {*chosen}:
        note += " They are not those of the largest s: their average is the best of all that were scored."

    def paint(figure: Any, narrow: bool) -> None:
        axes: Any = figure.subplots()
        image = axes.imshow(
            list(zip(*rows, strict=True)), aspect="auto", interpolation="none", cmap="Blues", vmin=0, vmax=1,
            origin="lower", extent=(at[0], max(at[-1], at[0] + 1), -0.5, n - 0.5),
        )  # fmt: skip
        axes.grid(visible=False)
        every = max(1, -(-n // (10 if narrow else 14)))
        shown = range((n - 1) % every, n, every)
        axes.set_yticks(shown, [step(candidates[i]["step"]) for i in shown])
        edge, size = axes.get_yaxis_transform(), 5 if n < 60 else 3
        axes.plot([1.02] * len(chosen), chosen, "<", transform=edge, clip_on=False, color=colour("best"), ms=size)
        axes.set(xlabel="step of the search", ylabel="candidate, by training step")
        figure.colorbar(image, location="bottom", aspect=40, label="probability s of being selected").ax.grid(
            visible=False
        )

    final = sorted(((rows[-1][i], candidates[i]["step"]) for i in range(n)), reverse=True)[:8]
    likely = ", ".join(f"step {step(number)} {value:.2f}" for value, number in final)
    summary = (
        f"Heat map of {n} candidates over {at[-1] - at[0] + 1} steps of the search. Likeliest at the end: {likely}."
    )
    svgs = draw(key, title, summary, paint, height=400, narrow_height=430)
    headings = ["training step", *(f"s after {step(number)}" for number in _few(at))]
    columns = [rows[list(at).index(number)] for number in _few(at)]
    cells = [[step(c["step"]), *(f"{row[i]:.3f}" for row in columns)] for i, c in enumerate(candidates)]
    return Plot(
        title=title, summary=summary, svgs=svgs, note=note,
        table=Table(headings=headings, rows=cells, title="Probabilities at some steps of the search"),
    )  # fmt: skip


def _few(values: Sequence[int], most: int = 6) -> list[int]:
    every = max(1, (len(values) - 1) // (most - 1)) if len(values) > 1 else 1
    return list(dict.fromkeys([*values[::every][: most - 1], values[-1]]))


def _walk(report: Report, key: str) -> Plot:
    candidates, title = [c for c in report["candidates"] if "decision" in c], "ASWA: its walk through the candidates"
    counts = {name: sum(c["decision"] == name for c in candidates) for name in _DECISIONS}

    def paint(figure: Any, narrow: bool) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes: Any = figure.subplots()
        entries: list[tuple[Any, str]] = []
        alone = [(c["step"], c["alone"]) for c in candidates if c.get("alone") is not None]
        if alone:
            (line,) = axes.plot(*zip(*alone, strict=True), "-", color=colour("soft"), lw=1, alpha=0.7)
            entries.append((line, "candidate alone"))
        for name, (shape, shade, label) in _DECISIONS.items():
            points = [(c["step"], _reached(c)) for c in candidates if c["decision"] == name]
            points = [point for point in points if point[1] is not None]
            if points and name != "start":
                (dots,) = axes.plot(
                    *zip(*points, strict=True),
                    shape,
                    color=colour(shade),
                    ms=11 if shape == "*" else 6,
                    mew=1.6,
                    ls="none",
                )
                entries.append((dots, label))
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: step(round(x))))
        axes.set(xlabel="training step", ylabel="score (higher is better)")
        legend(figure, narrow, entries)

    summary = f"{counts['soft']} candidates joined the average, {counts['hard']} restarted it, "
    summary += f"{counts['reject']} were rejected; the first one started it."
    cells = [[step(c["step"]), cell(c.get("alone")), cell(c.get("if added")), c["decision"]] for c in candidates]
    return Plot(
        title=title, summary=summary, svgs=draw(key, title, summary, paint, height=320),
        note="A mark is the score of the average with the candidate in it; of a restart, that of the candidate alone.",
        table=Table(headings=["step", "alone", "if added", "decision"], rows=cells, title="Decision by candidate"),
    )  # fmt: skip


def _reached(candidate: Any) -> float | None:
    return candidate.get("alone") if candidate["decision"] == "hard" else candidate.get("if added")


def _losses(report: Report, key: str) -> Plot | None:
    trace, settings, split = report["trace"], report.get("settings", {}), report.get("scored_on", "val")
    losses, at, scored = trace["loss"], trace.get("scored_step", []), trace.get("scored_loss", [])
    pairs = [(x, y) for x, y in zip(at, scored, strict=False) if y is not None]
    fitted = settings.get("on") or split
    held = fitted != split or bool(settings.get("patience"))
    other = f"held-out loss, {data(split)}" if held else f"exact average, {data(split)} (fitted)"
    label, title = f"loss of a batch, {data(fitted)}", "Loss during the search"
    smooth = _means(losses)
    if not smooth:
        return None

    def paint(figure: Any, narrow: bool) -> None:
        axes: Any = figure.subplots()
        points = [(i, y) for i, y in enumerate(losses, 1) if y is not None]
        (dots,) = axes.plot(*zip(*points, strict=True), ".", ms=2.5, color=colour("soft"), alpha=0.6)
        (line,) = axes.plot(*zip(*smooth, strict=True), "-", color=colour("average"), lw=2)
        entries = [(dots, label), (line, "its running mean")]
        if pairs:
            (marks,) = axes.plot(*zip(*pairs, strict=True), "s--", color=colour("best"), ms=5, lw=1.4)
            entries.append((marks, other))
        axes.set(xlabel="step of the search", ylabel="loss (lower is better)")
        legend(figure, narrow, entries, columns=2 if len(other) < 60 else 1)

    summary = f"{label}: from {signed(smooth[0][1])} to {signed(smooth[-1][1])} in {len(losses)} steps."
    if pairs:
        summary += f" {other}: lowest {signed(min(y for _, y in pairs))}, {signed(pairs[-1][1])} at the end."
    rows = [[step(x), signed(y)] for x, y in pairs] or [[step(round(x)), signed(y)] for x, y in smooth]
    headings = ["step of the search", other if pairs else "running mean of the loss"]
    return Plot(
        title=title, summary=summary, svgs=draw(key, title, summary, paint, height=320, narrow_height=360),
        table=Table(headings=headings, rows=rows, title=title),
    )  # fmt: skip


def _means(values: Sequence[float | None], parts: int = 40) -> list[tuple[float, float]]:
    """Return the means of consecutive parts of a curve, each at the middle of its steps."""
    width = max(1, len(values) // parts)
    result: list[tuple[float, float]] = []
    for start in range(0, len(values), width):
        known = [value for value in values[start : start + width] if value is not None]
        if known:
            result.append((start + (min(width, len(values) - start) + 1) / 2, sum(known) / len(known)))
    return result


def _best_score(report: Report, key: str) -> Plot:
    values, title = report["trace"]["best_score"], "Best score so far"

    def paint(figure: Any, narrow: bool) -> None:
        axes: Any = figure.subplots()
        axes.step(range(1, len(values) + 1), values, where="post", color=colour("average"), lw=2)
        axes.set(xlabel="scored mixtures", ylabel="score (higher is better)")

    summary = f"From {signed(values[0])} to {signed(values[-1])} in {len(values)} steps."
    rows = [[step(i + 1), signed(values[i])] for i in _few(range(len(values)), 20)]
    return Plot(
        title=title, summary=summary, svgs=draw(key, title, summary, paint, height=260),
        table=Table(headings=["scored mixtures", "best score"], rows=rows, title=title),
    )  # fmt: skip


def tables(report: Report) -> list[Table]:
    """Return the strategy's tables without losses, which have no plot."""
    named = report.get("tables", {})
    return [_table(title, rows) for title, rows in named.items() if rows and not _curves(rows)]


def _table(title: str, rows: Sequence[Row]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(title=title, headings=columns, rows=[[cell(row.get(name)) for name in columns] for row in rows])


def _curves(rows: Sequence[Row]) -> list[str]:
    """Return the columns of losses, behind the first numeric one, which they depend on."""
    names = [name for row in rows for name in row if _number(row[name]) is not None]
    return [name for name in list(dict.fromkeys(names))[1:] if name.endswith("loss") or name in _LOSSES]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _by_column(title: str, rows: Sequence[Row], key: str) -> Plot:
    """Return losses by the first numeric column of a strategy's table, such as K; by trial, if that repeats."""
    curves, table = _curves(rows), _table(title, rows)
    x = next(name for row in rows for name in row if _number(row[name]) is not None)
    tried = [_number(row.get(x)) or 0.0 for row in rows]
    trials = len(set(tried)) < len(tried)
    at = [float(i + 1) for i in range(len(rows))] if trials else tried
    known = sorted(value for name in curves for row in rows if (value := _number(row.get(name))) is not None)
    usual = known[(len(known) * 4) // 5]
    top = usual + 2 * (usual - known[0])  # one loss of a step too long hides all others
    caption = title[:1].upper() + title[1:]

    def paint(figure: Any, narrow: bool) -> None:
        from matplotlib.ticker import MaxNLocator

        axes: Any = figure.subplots()
        entries: list[tuple[Any, str]] = []
        for (shade, dashes), marker, name in zip(_SHADES, "os^D", curves, strict=False):
            points = [
                (i, value) for i, row in zip(at, rows, strict=True) if (value := _number(row.get(name))) is not None
            ]
            ls = "none" if name == "loss" and len(points) < len(rows) else dashes
            x_values, values = zip(*sorted(points), strict=True)
            (line,) = axes.plot(x_values, values, marker=marker, ls=ls, color=colour(shade), ms=5, lw=1.5)
            entries.append((line, _LOSSES.get(name, name)))
        if known[-1] > top:
            axes.set_ylim(top=top)
        if trials:
            axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, integer=True))
        elif min(at) > 0 and max(at) > 30 * min(at):
            axes.set_xscale("log")
            logarithmic(axes.xaxis)
        axes.set(xlabel="trial, in order" if trials else x, ylabel="loss (lower is better)")
        legend(figure, narrow, entries)

    by = "held-out" if "held-out" in curves else curves[0]
    lowest = min((value, tried[i]) for i, row in enumerate(rows) if (value := _number(row.get(by))) is not None)
    summary = f"{_LOSSES.get(by, by)}: lowest {signed(lowest[0])}, at {x} {lowest[1]:.3g}."
    over = sum(value > top for value in known)
    note = f"Not shown: {over} larger than {signed(top)}; they are among the numbers." if over else ""
    svgs = draw(key, caption, summary, paint, height=320, narrow_height=340)
    return Plot(title=caption, summary=summary, svgs=svgs, table=table, note=note)
