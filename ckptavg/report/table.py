"""Report for a terminal: candidates, scores, verdict and cost."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ckptavg.cost import Cost
from ckptavg.errors import printable
from ckptavg.report import evaluation, landscape
from ckptavg.report.comparison import comparison_table
from ckptavg.report.display import Report
from ckptavg.report.result import CandidateResult, Comparison, Evaluation, Inspection, Landscape, Output, Result, Row
from ckptavg.score import Score, Split

_BARS = "▁▂▃▄▅▆▇█"
_MOST = 5  # columns of figures, so that 80 columns are enough


def render(report: Report) -> Group:
    """Render the whole report, from the candidates to the written file."""
    if not isinstance(report, Result):
        return summary(report)
    if isinstance(report, Comparison) and report.strategies:
        return Group(
            _candidates(report),
            *_other_metrics(report),
            Text(),
            *comparison_table(report),
            *_foot(report),
        )
    return Group(*_parts(report))


def summary(report: Report) -> Group:
    """Render the scores, the verdict and the written file; a report other than of candidates as a whole."""
    if isinstance(report, Landscape):
        return Group(*landscape.render(report))
    if isinstance(report, Evaluation):
        return Group(evaluation.scores_table(report))
    if isinstance(report, Comparison) and report.strategies:
        return Group(*comparison_table(report), *_written(report))
    if isinstance(report, Result):
        return Group(*_verdict(report), *_written(report))
    if isinstance(report, Inspection):
        columns = ("step", "format", "parameters", "dtype")
        rows = [
            {"candidate": Path(row["path"]).name} | {name: row[name] for name in columns} for row in report.candidates
        ]
        return Group(_rows(f"{len(rows)} candidates, {len(report.left_out)} files left out", rows))
    return Group(Text(str(report)))


def _parts(result: Result) -> Iterator[RenderableType]:
    yield _candidates(result)
    yield from _other_metrics(result)
    if len(result.groups) > 1:
        yield from (Text(), _blocks(result))
    for title, rows in result.tables.items():
        yield from (Text(), _rows(title, rows))
    yield from _verdict(result)
    if result.cost:
        yield Text(_cost(result.cost), style="dim")
    yield from _foot(result)


def _verdict(result: Result) -> Iterator[RenderableType]:
    if result.scores:
        yield from (Text(), *_scores(result), Text())
        yield Text(result.verdict, style="bold red" if result.worse else "bold" if "test" in result.scores else "")
    elif result.output:
        yield Text("Nothing was scored: there is no task (--task).", style="bold")


def _written(result: Result) -> Iterator[Text]:
    """Yield the line of the written file, else what a dry run would do."""
    yield from map(Text, [*_file_notes(result.output)][:1] if result.output else result.warnings)


def _foot(result: Result) -> list[Text]:
    return [Text(note, style="dim") for note in _notes(result)]


def _candidates(result: Result) -> Table:
    columns = list(dict.fromkeys(name for candidate in result.candidates for name in candidate.columns))
    scores = [candidate.score for candidate in result.candidates]
    kinds = _names(scores)
    if len(columns) + len(kinds) > _MOST:
        kinds = kinds[:2]
    table = Table(title=f"{len(result.candidates)} candidates", title_justify="left", box=None, pad_edge=False)
    for heading in ("candidate", "step", *columns, *kinds, ""):
        table.add_column(heading, justify="left" if heading in ("candidate", "") else "right", no_wrap=True)
    for candidate in result.candidates:
        coefficients = _coefficients(candidate)
        chosen = result.output is not None and candidate.coefficient != 0
        several = f" … {max(coefficients):.3f}" if len(coefficients) > 1 else ""
        table.add_row(
            escape(printable(candidate.path.name)),
            str(candidate.step),
            *(_cell(candidate.columns[name]) for name in columns),
            *(_cell(candidate.score and candidate.score.figures.get(kind)) for kind in kinds),
            f"● {min(coefficients):.3f}{several}" if chosen else "",
            style=None if chosen or result.output is None else "dim",
        )
    return table


def _other_metrics(result: Result) -> Iterator[Table]:
    """Yield tables of the candidates' metrics for which `_candidates` has no room on 80 columns."""
    scores = [candidate.score for candidate in result.candidates]
    names = _names(scores)
    if len({name for candidate in result.candidates for name in candidate.columns}) + len(names) <= _MOST:
        return
    for start in range(2, len(names), _MOST):
        rows = [
            {"step": candidate.step} | {name: candidate.score.figures.get(name) for name in names[start:][:_MOST]}
            for candidate in result.candidates
            if candidate.score is not None
        ]
        yield _rows("other metrics of the candidates", rows)


def _names(scores: Iterable[Score | None]) -> list[str]:
    """Return the names of the figures of the scores, in order."""
    return list(dict.fromkeys(name for score in scores if score is not None for name in score.figures))


def _coefficients(candidate: CandidateResult) -> Sequence[float]:
    return candidate.coefficient if isinstance(candidate.coefficient, tuple) else (candidate.coefficient,)


def _cell(value: float | str | None) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:.4f}"


def _blocks(result: Result) -> Table:
    """Build one row per block of tensors: least and greatest coefficient, and all of them as bars in training order."""
    rows = list(zip(*map(_coefficients, result.candidates), strict=True))
    low, high = min(map(min, rows)), max(map(max, rows))
    table = Table(title=f"{len(rows)} blocks", title_justify="left", box=None, pad_edge=False)
    table.add_column("tensors", no_wrap=True)
    table.add_column("least", justify="right", no_wrap=True, min_width=8)
    table.add_column("greatest", justify="right", no_wrap=True, min_width=8)
    table.add_column(f"coefficients, ▁ is {low:.3f}, █ is {high:.3f}", no_wrap=True)
    for names, row in zip(result.groups, rows, strict=True):
        bars = (_BARS[round((c - low) / (high - low or 1) * (len(_BARS) - 1))] for c in row)
        table.add_row(escape(_listing(names)), f"{min(row):.3f}", f"{max(row):.3f}", "".join(bars))
    return table


def _rows(title: str, rows: Sequence[Row]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        cells = (row.get(name) for name in columns)
        table.add_row(*(str(cell) if isinstance(cell, int) else _cell(cell) for cell in cells))
    return table


def _scores(result: Result) -> Iterator[Table]:
    written = "written: best single" if result.replaced else result.strategy
    rows: dict[str, Mapping[Split, Score]] = {written: result.scores}
    for name, scores in result.baselines.items():
        if name.partition("-")[0] != result.strategy:  # not lawa-5 beside lawa
            rows[f"best single (step {result.best_step})" if name == "best" else name] = scores
    columns: list[tuple[Split, str]] = [
        (split, name) for split, score in result.scores.items() for name in score.figures
    ]
    if len(columns) <= _MOST:
        yield _scores_table(rows, columns, written)
        return
    for split, score in result.scores.items():
        names = list(score.figures)
        for start in range(0, len(names), _MOST):
            part: list[tuple[Split, str]] = [(split, name) for name in names[start:][:_MOST]]
            yield _scores_table(rows, part, written)


def _scores_table(
    rows: Mapping[str, Mapping[Split, Score]], columns: Sequence[tuple[Split, str]], written: str
) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("scores", no_wrap=True)
    for split, kind in columns:
        table.add_column(f"{split} {kind}", justify="right", overflow="fold")
    for name, scores in rows.items():
        cells = (_cell(scores[split].figures.get(kind) if split in scores else None) for split, kind in columns)
        table.add_row(name, *cells, style="bold" if name == written else None)
    return table


def _notes(result: Result) -> Iterator[str]:
    """Yield the lines below the tables: data of the scores, candidate matrix, written file."""
    matrix, output = result.matrix, result.output
    if result.scores:
        if result.holdout is not None:
            percent = f"{result.holdout:.0%}"
            yield f"test is {percent} of the validation data: chosen by a seeded hash, kept out of the search."
        if result.scored_on == "train":
            yield "Scored on training data: the task has no val_dataloader()."
        if any(score.figures.keys() >= {"accuracy", "nll", "brier", "ece"} for score in result.scores.values()):
            yield "ece: expected calibration error of the top label, in 15 bins of equal width"
    if matrix:
        size = f"{matrix.bytes:,} bytes"
        if matrix.group_size is not None:
            yield (
                f"searched at {matrix.bits} bits: the candidate matrix took {size}, and rounding lost "
                f"{matrix.error:.1%} of the candidates' differences; all scores are of exact averages"
            )
        if matrix.offload != "none":
            yield f"searched with --offload {matrix.offload}: candidates streamed through buffers of {size}"
        if matrix.precision != "float32":
            yield f"searched with --precision {matrix.precision}; all scores use the model's own precision"
    yield from _file_notes(output) if output else ()


def _file_notes(output: Output) -> Iterator[str]:
    path = printable(str(output.path))
    yield f"wrote {path}: {output.bytes:,} bytes, {output.dtype}, sha256 {output.sha256[:16]}…"
    if output.recomputed:
        yield f"recomputed from data: {_listing(output.recomputed)}"
    if output.not_averaged:
        yield f"not averaged, copied from the last selected candidate: {_listing(output.not_averaged)}"
    if output.averaged_buffers:
        takes = "--keep PATTERN takes them from the last selected candidate"
        yield f"averaged buffers: {_listing(output.averaged_buffers)} ({takes})"


def _cost(cost: Cost) -> str:
    if not cost.forward_batches:
        return f"cost: {cost.evaluations} mixtures scored, {cost.seconds:.1f} s"
    epochs = "" if cost.epochs is None else f" = {cost.epochs:.1f} epochs of the {cost.epochs_of} data"
    batches = f"{cost.forward_batches} forward and {cost.backward_batches} backward batches"
    return f"cost: {batches}{epochs}, {cost.seconds:.1f} s"


def _listing(names: Sequence[str]) -> str:
    return printable(", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else ""))
