"""Report as Markdown, from the JSON report as a dictionary: the verdict, the scores, and what they are of."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ckptavg.checkpoints.checkpoint import shortest_names
from ckptavg.errors import counted, decimal
from ckptavg.report.markdown_tables import (
    Json,
    candidates,
    predictions_table,
    rows_table,
    score_table,
    side_by_side,
    strategy_table,
)
from ckptavg.report.markup import block, code, details, escaped, table
from ckptavg.score import DATA

_AVERAGES: Final = ("average", "comparison", "posterior")


def markdown(reports: Sequence[Json]) -> str:
    """Return the text of one report, or of several below a table that has them side by side.

    Args:
        reports: as `ckptavg.report.as_json.to_dict` returns them, or read from the files of ``--report``.
    """
    if len(reports) == 1:
        return "\n\n".join([f"# {_title(reports[0])}", *_answer(reports[0]), *_rest(reports[0])]) + "\n"
    parts = [f"# {counted(len(reports), 'report')}", side_by_side(reports)]
    for number, report in enumerate(reports, 1):
        parts += [f"## {number}. {_title(report)}", *_answer(report)]
        parts.append(details("candidates, cost, how to reproduce it", "\n\n".join(_rest(report))))
    return "\n\n".join(parts) + "\n"


def summary(report: Json) -> str:
    """Return the verdict and the scores, and the rest of the report folded."""
    rest = details("candidates, cost, how to reproduce it", "\n\n".join(_rest(report)))
    return "\n\n".join([f"## {_title(report)}", *_answer(report), rest]) + "\n"


def short_summary(report: Json) -> str:
    """Return the verdict alone."""
    return "\n\n".join([f"## {_title(report)}", *_verdict(report)]) + "\n"


def _title(report: Json) -> str:
    kind = report["kind"]
    if kind == "average":
        return f"ckptavg {code(report['strategy'])}"
    names = {"comparison": "ckptavg compare", "posterior": "ckptavg swag", "landscape": "ckptavg landscape"}
    return names.get(kind, f"ckptavg: {escaped(kind)}")


def _answer(report: Json) -> Iterator[str]:
    """Yield the paragraphs and tables that a reader looks for first."""
    yield from _verdict(report)
    if report["kind"] == "landscape":
        yield from _quadratic(report)
    elif report.get("strategies"):
        yield from strategy_table(report)
    elif report.get("scores"):
        yield score_table(report)
    for split, models in report.get("predictions", {}).items():
        yield predictions_table(report, split, models)
    outputs = [report.get("output"), *report.get("draws", ()), report.get("posterior")]
    if lines := [f"- {_file(output)}" for output in outputs if output]:
        yield "\n".join(["Written:", "", *lines])


def _verdict(report: Json) -> Iterator[str]:
    if verdict := report.get("verdict"):
        yield f"**{escaped(verdict)}**"
    elif report["kind"] in ("average", "posterior") and report["output"]:
        yield "**Nothing was scored: there is no task (`--task`).**"
    if reason := report.get("reason"):
        yield escaped(reason)


def _rest(report: Json) -> Iterator[str]:
    """Yield candidates, cost, remarks and the way to reproduce; the whole of a report of another kind."""
    if report["kind"] not in (*_AVERAGES, "landscape"):
        yield block(json.dumps(report, indent=2, ensure_ascii=False), "json")
        return
    if report["kind"] in _AVERAGES and report["candidates"]:
        yield from candidates(report)
        yield from (f"{escaped(title)}\n\n{rows_table(rows)}" for title, rows in report["tables"].items() if rows)
        yield from _cost(report)
    yield from _notes(report)
    yield from _left_out(report)
    yield from _reproduction(report)


def _cost(report: Json) -> Iterator[str]:
    if cost := report["cost"]:
        passes = "" if cost["passes"] is None else f"{cost['passes']:.0f} passes over the {DATA[cost['passes_over']]} "
        passes = f"{passes}data: " if passes else ""
        batches = f"{cost['forward_batches']} forward and {cost['backward_batches']} backward batches"
        spent = batches if cost["forward_batches"] else counted(cost["evaluations"], "score")
        yield f"Cost: {passes}{spent}, {cost['seconds']:.1f} s."


def _notes(report: Json) -> Iterator[str]:
    """Yield the warnings, and what the figures of the report are of."""
    lines = [escaped(warning) for warning in report["warnings"]]
    if report.get("holdout") is not None:
        part = f"test is {report['holdout']:.0%} of the validation data"
        lines.append(f"{part}: chosen by a seeded hash, kept out of the search")
    if report.get("scores") and report["scored_on"] == "train":
        lines.append("scored on training data: the task has no `val_dataloader()`")
    if report.get("unfinished"):
        lines.append(f"not finished: {', '.join(map(code, report['unfinished']))}")
    matrix = report.get("matrix")
    if matrix and matrix["group_size"] is not None:
        lines.append(f"searched at {matrix['bits']} bits; all scores are of exact averages")
    output = report.get("output") or {}
    texts = {
        "recomputed": "recomputed from data", "derived": "recomputed from the averaged weight",
        "not_averaged": "not averaged, copied from the last selected candidate", "averaged_buffers": "averaged buffers",
    }  # fmt: skip
    for key, text in texts.items():
        if names := output.get(key):
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            lines.append(f"{text}: {', '.join(map(code, names[:2]))}{more}")
    if lines:
        yield "\n".join(["Remarks:", "", *(f"- {line}" for line in lines)])


def _left_out(report: Json) -> Iterator[str]:
    if files := report["left_out"]:
        names = shortest_names([Path(file["path"]) for file in files])
        rows = [[code(name, cell=True), escaped(file["reason"])] for name, file in zip(names, files, strict=True)]
        yield details(f"{counted(len(files), 'file')} left out", table(["left out", "because"], rows, left=2))


def _reproduction(report: Json) -> Iterator[str]:
    run, output, lines = report["run"], report.get("output") or {}, list[str]()
    if run:
        yield f"To reproduce it:\n\n{block(run['command'], 'sh')}"
        lines += [f"{escaped(name)} {escaped(number)}" for name, number in run["versions"].items()]
        lines += [f"{code(name)} = {code(value)}" for name, value in run["configuration"].items()]
        lines += [f"{run['processes']} processes (torchrun)"] if run["processes"] > 1 else []
    if "settings" in report:
        own = {name: value for name, value in report["settings"].items() if value is not None}
        settings = ", ".join(f"{name}={json.dumps(value)}" for name, value in own.items())
        lines.append(
            f"{code(report['strategy'])}{f' with {code(settings)}' if settings else ''}; seed {report['seed']}"
        )
    if digest := output.get("sha256") or output.get("data_digest"):
        lines.append(f"digest of the output: {code(digest)}")
    if lines:
        yield "\n".join(f"- {line}" for line in lines)
    for name, step in report.get("next_steps", {}).items():
        yield f"To {name} it:\n\n{block(step, 'sh' if name == 'verify' else 'python')}"


def _file(output: Json) -> str:
    return f"{code(str(output['path']))}: {output['bytes']:,} bytes, {escaped(output['dtype'])}"


def _quadratic(report: Json) -> Iterator[str]:
    """Yield the figures of a landscape."""
    n, values = len(report["steps"]), report["eigenvalues"]
    yield f"Loss at the mean of {counted(n, 'candidate')}: {decimal(report['loss_at_mean'])}."
    fit = f"Spearman {decimal(report['spearman'])}, R² {decimal(report['r_squared'])}"
    yield f"**On {counted(len(report['measured']), 'random mixture')}: {fit}.**"
    if values:
        yield f"Curvature: {escaped(report['curvature'])}; eigenvalues from {values[0]:.4g} to {values[-1]:.4g}."
    if plane := report["plane"]:
        rows = [[code(mark["name"], cell=True), decimal(mark["loss"])] for mark in plane["mixtures"]]
        yield table(["corner of the plane", f"{DATA.get(plane['split'], plane['split'])} loss"], rows)
