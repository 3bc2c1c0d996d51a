"""Tables and lists of a page: candidates, scores, what was left out, cost, output, settings, and runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.filesize import decimal as size

from ckptavg.report.json_values import coefficients, figures
from ckptavg.report.page.figure import Table
from ckptavg.report.page.numbers import Report, cell, data, seconds, signed, step, with_noise
from ckptavg.report.page.verdict import answer, name_of

_OWN = {"path", "step", "coefficient", "score"}


def candidates(report: Report) -> Table | None:
    """Return the table of all candidates: step, coefficient, scores and the strategy's own columns."""
    rows = report.get("candidates", [])
    if not rows:
        return None
    if "coefficient" not in rows[0]:  # of an inspection
        columns = [name for name in rows[0] if isinstance(rows[0][name], str | int | float)]
        cells = [[cell(row.get(name)) for name in columns] for row in rows]
        return Table(title=f"All {len(rows):,} candidates", headings=columns, rows=cells)
    names = list(dict.fromkeys(name for row in rows for name in figures(row.get("score"))))
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in _OWN))
    faults = [(row.get("score") or {}).get("invalid", "") for row in rows]
    cells: list[list[str]] = []
    for row, fault in zip(rows, faults, strict=True):
        weights, values = coefficients(row), figures(row.get("score"))
        weight = signed(weights[0]) if len(weights) == 1 else f"{signed(min(weights))} … {signed(max(weights))}"
        scores = [with_noise(*values.get(name, (None, None))) for name in names]
        own = [cell(row.get(name)) for name in columns]
        cells.append([step(row["step"]), row["path"], weight, *scores, *own, *([fault] if any(faults) else [])])
    headings = ["step", "file", "coefficient", *names, *columns, *(["invalid"] if any(faults) else [])]
    return Table(title=f"All {len(rows):,} candidates", headings=headings, rows=cells)


def scores_table(report: Report) -> list[Table]:
    """Return the scores of the written file and of its rivals, by split; a comparison has its own table."""
    if not report.get("scores") or report.get("strategies"):
        return []
    rows = {("written: best single" if report.get("replaced") else name_of(report)): report["scores"]}
    best = report.get("best_step")
    names = {"best": "best single" + (f" (step {step(best)})" if best is not None else ""), "swa": "swa (mean of all)"}
    rows |= {names.get(name, name): scores for name, scores in report.get("baselines", {}).items()}
    columns = list(
        dict.fromkeys((s, name) for scores in rows.values() for s, score in scores.items() for name in figures(score))
    )
    cells = [
        [str(name), *(with_noise(*figures(scores.get(s)).get(figure, (None, None))) for s, figure in columns)]
        for name, scores in rows.items()
    ]
    headings = ["", *(f"{figure}, {data(s)}" for s, figure in columns)]
    return [Table(title="Scores ± standard errors", headings=headings, rows=cells)]


def files(report: Report) -> list[Table]:
    """Return the scores of the files of an evaluation."""
    rows = report.get("files", [])
    splits = list(dict.fromkeys(name for row in rows for name in row if name != "path"))
    columns = list(dict.fromkeys((s, name) for row in rows for s in splits for name in figures(row.get(s))))
    cells = [
        [row["path"], *(with_noise(*figures(row.get(s)).get(name, (None, None))) for s, name in columns)]
        for row in rows
    ]
    headings = ["file", *(f"{name}, {data(s)}" for s, name in columns)]
    return [Table(title="Scores of the files", headings=headings, rows=cells)] if rows else []


def left_out(report: Report) -> list[Table]:
    """Return the files that are no candidates, with the reasons, and strategies that did not finish."""
    rows = [[str(entry["path"]), entry["reason"]] for entry in report.get("left_out", ())]
    found = [Table(title=f"{len(rows):,} left out", headings=["file", "reason"], rows=rows)] if rows else []
    unfinished = [[name, "did not finish"] for name in report.get("unfinished", ())]
    return found + (
        [Table(title="Strategies left out", headings=["strategy", ""], rows=unfinished)] if unfinished else []
    )


def cost(report: Report) -> list[tuple[str, str]]:
    """Return the work of the run."""
    spent, matrix = report.get("cost"), report.get("matrix")
    pairs: list[tuple[str, str]] = []
    if spent:
        pairs += [("time", seconds(spent))] if seconds(spent) else []
        pairs.append(("scored mixtures", cell(spent["evaluations"])))
        pairs += [
            ("forward batches", cell(spent["forward_batches"])),
            ("backward batches", cell(spent["backward_batches"])),
        ]
        if spent.get("passes") is not None:
            pairs.append((f"passes over the {data(spent['passes_over'])}", f"{spent['passes']:,.1f}"))
        if spent.get("epochs") is not None:
            pairs.append((f"epochs of the {data(spent['epochs_of'])}", f"{spent['epochs']:,.1f}"))
    if matrix:
        text = f"{size(matrix['bytes'])} at {matrix['bits']} bits"
        pairs.append(
            ("candidates in memory", text + (f", rounding error {matrix['error']:.1%}" if matrix["error"] else ""))
        )
    return pairs


def output(report: Report) -> list[tuple[str, str]]:
    """Return the written file: its path, size, dtype, digest, and tensors that are no averages."""
    written: Any = report.get("output") or {}
    if not written:
        return []
    pairs = [("path", written["path"]), ("size", size(written["bytes"])), ("dtype", written["dtype"])]
    pairs += [(name.replace("_", " "), written[name]) for name in ("data_digest", "sha256") if written.get(name)]
    for name, text in {
        "not_averaged": "copied from the last selected candidate", "recomputed": "recomputed from data",
        "derived": "recomputed from the averaged weight", "averaged_buffers": "averaged buffers",
    }.items():  # fmt: skip
        if names := written.get(name):
            more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
            pairs.append((text, ", ".join(names[:20]) + more))
    return pairs


def settings(report: Report) -> str:
    """Return the settings of the strategy that are set, as ``name=value``."""
    return ", ".join(f"{name}={_plain(value)}" for name, value in report["settings"].items() if value is not None)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def side_by_side(reports: Sequence[Report]) -> Table:
    """Return a row per run: its verdict, its scores and its cost."""
    headings = ["run", "strategy", "verdict"]
    scores = [report.get("scores") or {} for report in reports]
    columns = list(
        dict.fromkeys((s, name) for by_split in scores for s, score in by_split.items() for name in figures(score))
    )
    rows = [
        [f"{number}", name_of(report) if "strategy" in report else report["kind"], answer(report).sentence]
        + [with_noise(*figures(by_split.get(s)).get(name, (None, None))) for s, name in columns]
        + [seconds(report["cost"]) if report.get("cost") else ""]
        for number, (report, by_split) in enumerate(zip(reports, scores, strict=True), 1)
    ]
    return Table(
        title="The runs", headings=[*headings, *(f"{name}, {data(s)}" for s, name in columns), "time"], rows=rows
    )


def differing(reports: Sequence[Report]) -> Table | None:
    """Return the settings, seeds and numbers of candidates that are not the same in all runs."""
    every = [
        {"seed": report.get("seed"), "candidates": len(report.get("candidates", ())), **report.get("settings", {}),
         **(report.get("run") or {}).get("versions", {})}
        for report in reports
    ]  # fmt: skip
    names = [name for name in every[0] if all(name in values for values in every)]
    rows = [
        [name, *("" if values[name] is None else _plain(values[name]) for values in every)] for name in names
        if any(values[name] != every[0][name] for values in every)
    ]  # fmt: skip
    headings = ["setting", *(f"run {number}" for number in range(1, len(reports) + 1))]
    return Table(title="What differs", headings=headings, rows=rows) if rows else None
