"""Tables of a Markdown report: scores, strategies, predictions and candidates."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ckptavg.checkpoints.checkpoint import shortest_names
from ckptavg.errors import counted, decimal
from ckptavg.report.json_values import Json, coefficients, difference, figures, with_noise
from ckptavg.report.markup import code, details, escaped, table
from ckptavg.score import DATA

_FEW: Final = 12  # candidates that are shown unfolded
_SCORE_KEYS: Final = ("path", "step", "coefficient", "score")


def score_table(report: Json) -> str:
    """Return the scores of the written file and of its baselines, a column per split and figure."""
    recomputed = "\\*" if report["output"] and report["output"]["recomputed"] else ""
    own = "best single, as written" if report["replaced"] else f"{code(report['strategy'], cell=True)}, as written"
    names = {"best": f"best single (step {report['best_step']}){recomputed}", "last": f"last{recomputed}"}
    rows = {f"**{own}**": report["scores"]}
    for name, scores in report["baselines"].items():
        if name.partition("-")[0] != report["strategy"]:  # not lawa-5 beside lawa
            rows[names.get(name, escaped(name))] = scores
    columns = [(split, name) for split, score in report["scores"].items() for name in figures(score)]
    cells = [
        [name, *(_figure(scores.get(split), figure) for split, figure in columns)] for name, scores in rows.items()
    ]
    text = table(["scores", *(escaped(f"{split} {figure}") for split, figure in columns)], cells)
    if report["held_out"] is not None and not report["replaced"]:
        text += f"\n\nheld-out loss of the selection (validation loss plus optimism): {decimal(report['held_out'])}"
    note = "\n\n\\* BatchNorm recomputed: `ckptavg eval` scores the checkpoint as it is"
    return text + (note if recomputed else "")


def strategy_table(report: Json) -> Iterator[str]:
    """Yield the strategies of a comparison by the figure that decided, and what the columns mean."""
    splits = list(report["strategies"][0]["scores"])
    by = {"held-out loss": lambda row: row["held_out"], "loss": lambda row: row["scores"][splits[0]]["loss"]}
    losses = {row["name"]: by.get(report["selected_by"], lambda _: None)(row) for row in report["strategies"]}

    def rank(row: Json) -> tuple[bool, bool, float, float]:
        loss, gain = losses[row["name"]], row["over_last"][splits[0]]["value"]
        return row["name"] != report["winner"], loss is None, loss or 0.0, math.inf if gain is None else -gain

    strategies = sorted(report["strategies"], key=rank)
    columns = [(split, name) for split in splits for name in figures(strategies[0]["scores"][split])]
    held_out, rows = any(row["held_out"] is not None for row in strategies), list[list[str]]()
    for row in strategies:
        name, cost = code(row["name"], cell=True), row["cost"]
        rows.append([
            f"**{name}**" if row["name"] == report["winner"] else name,
            {None: "none", "train": "train"}.get(row["chose_on"], "val"),
            "" if row["name"] == "last" else _gain(row["over_last"][splits[-1]], splits[-1] == "test"),
            *(_figure(row["scores"][split], figure) for split, figure in columns),
            *([decimal(row["held_out"])] if held_out else []),
            str(row["used"]),
            f"{cost['passes']:.0f}" if cost["passes"] is not None else f"{cost['evaluations']} scores",
            f"{cost['seconds']:.1f}",
        ])  # fmt: skip
    headings = ["strategy", "chose on", f"vs last ({splits[-1]})"]
    headings += [escaped(f"{split} {figure}") for split, figure in columns]
    yield table([*headings, *(["held-out loss"] if held_out else []), "used", "passes", "s"], rows, left=3)
    judged, data = splits[-1], DATA[splits[-1]]
    interval = "with its 95 % interval; ≈: the interval includes zero"
    evidence = f"difference on test data, {interval}" if judged == "test" else f"on {data} data, so it is no evidence"
    yield (
        f"vs last: {evidence}. chose on: the data of a strategy's choice, on which its score is optimistic. "
        "Each strategy is charged as if it had run alone."
    )


def _gain(gain: Json, evidence: bool) -> str:
    if not evidence or gain["low"] is None:
        return decimal(gain["value"], "+")
    return f"{difference(gain)}{'' if gain['separated'] else ' ≈'}"


def _figure(score: Json | None, name: str) -> str:
    return with_noise(*figures(score).get(name, (None, None)))


def predictions_table(report: Json, split: Any, models: Json) -> str:
    """Return NLL and metrics of averaged predictions on a split, a row per model."""
    scores = {name: {"nll": p["score"]["loss"], **p["score"].get("metrics", {})} for name, p in models.items()}
    columns = ["nll", *(name for name in ("accuracy", "brier", "ece") if name in scores["swa"])]
    drawn = f"swag: {counted(models['swag']['models'], 'draw')}, scale {report['gaussian']['scale']:g}"
    rows = [
        [drawn if name == "swag" else name, *(decimal(score[column]) for column in columns)]
        for name, score in scores.items()
    ]
    return table([f"predictions, {DATA.get(split, split)} data", *columns], rows)


def candidates(report: Json) -> Iterator[str]:
    """Yield the table of the candidates: of many the best, the last, and those of the largest coefficients."""
    rows = report["candidates"]
    n, shown = len(rows), range(len(rows))
    names = shortest_names([Path(row["path"]) for row in rows])
    used = sum(any(coefficients(row)) for row in rows)
    headings, make_row = _candidate_rows(report, names)
    if n > _FEW:
        largest = sorted(shown, key=lambda i: (-max(map(abs, coefficients(rows[i]))), -i))[: _FEW - 2]
        ends = [i for i in shown if i == n - 1 or rows[i]["step"] == report["best_step"]]
        shown = sorted({*(i for i in largest if any(coefficients(rows[i]))), *ends})
    what = f"{used} of {counted(n, 'candidate')} averaged" if report["output"] else counted(n, "candidate")
    effective = report["effective"]
    if report["output"] and effective is not None and round(effective, 1) != used:
        what += f"; effective number 1/Σβ²: {effective:.1f}"
    what += ", with the best and the last" if len(shown) < n else ""
    yield f"{what}:\n\n{table(headings, [make_row(i) for i in shown], left=1)}"
    if len(shown) < n:
        yield details(f"all {n:,} candidates", table(headings, [make_row(i) for i in range(n)], left=1))


def _candidate_rows(report: Json, names: Sequence[str]) -> tuple[list[str], Callable[[int], list[str]]]:
    """Return the headings of the candidates' table, and the function that makes a row of it."""
    rows = report["candidates"]
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in _SCORE_KEYS))
    scores = list(dict.fromkeys(name for row in rows if row["score"] for name in figures(row["score"])))
    columns = [name for name in columns if name != "alone" or not scores]

    def make(i: int) -> list[str]:
        row, betas = rows[i], coefficients(rows[i])
        coefficient = f"{min(betas):.3f}{f' … {max(betas):.3f}' if len(betas) > 1 else ''}" if any(betas) else ""
        cells = [*(_cell(row.get(name)) for name in columns), *(_figure(row["score"], name) for name in scores)]
        return [code(names[i], cell=True), str(row["step"]), coefficient, *cells]

    return ["candidate", "step", "coefficient", *map(escaped, [*columns, *scores])], make


def _cell(value: float | str | None) -> str:
    return escaped(value) if isinstance(value, str) else str(value) if isinstance(value, int) else decimal(value)


def rows_table(rows: Sequence[Json]) -> str:
    """Return a table of a strategy's own: each column → value."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return table([*map(escaped, columns)], [[_cell(row.get(name)) for name in columns] for row in rows])


def side_by_side(reports: Sequence[Json]) -> str:
    """Return one row per report: the command, the written file's scores, and the cost."""
    found = [report.get("scores") or {} for report in reports]
    columns = list(
        dict.fromkeys((s, name) for scores in found for s, score in scores.items() for name in figures(score))
    )
    rows: list[list[str]] = []
    for number, (report, scores) in enumerate(zip(reports, found, strict=True), 1):
        name = report.get("winner") or report.get("strategy") or report["kind"]
        cells = [_figure(scores.get(split), figure) for split, figure in columns]
        spent = f"{report['cost']['seconds']:.1f}" if report.get("cost") else ""
        output = code(Path(report["output"]["path"]).name, cell=True) if report.get("output") else ""
        rows.append([str(number), code(name, cell=True), output, *cells, spent])
    headings = ["report", "strategy", "output", *(escaped(f"{split} {name}") for split, name in columns), "s"]
    return table(headings, rows, left=3)
