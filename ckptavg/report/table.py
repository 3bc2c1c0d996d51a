"""Report for a terminal: candidates, scores, verdict and cost."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from ckptavg.checkpoints.checkpoint import shortest_names
from ckptavg.cost import Cost
from ckptavg.errors import counted, decimal, printable
from ckptavg.report import basin, evaluation, landscape, posterior
from ckptavg.report.bars import heights
from ckptavg.report.candidates import candidates_table, cell, coefficients_of
from ckptavg.report.comparison import FOOTNOTE, HELD_OUT, answer, comparison_table, without_interval
from ckptavg.report.digits import ERROR, figure_column, figure_places
from ckptavg.report.display import Report
from ckptavg.report.layout import FittedTable, Sentence
from ckptavg.report.result import Comparison, Evaluation, Inspection, Landscape, Output, Result, Row
from ckptavg.score import DATA


def render(report: Report) -> Group:
    """Render the whole report, from the candidates to the written file."""
    if not isinstance(report, Result):
        return summary(report)
    if isinstance(report, Comparison) and report.strategies:
        table = (Text(), *comparison_table(report), Text(), *candidates_table(report))
        return Group(*answer(report), *_written(report), *table, *_foot(report, written=False))
    if isinstance(report, posterior.PosteriorResult) and not report.candidates:
        return Group()  # the warnings say it all
    return Group(*_parts(report))


def summary(report: Report) -> Group:
    """Render the scores, the verdict and the written file; a report other than of candidates as a whole."""
    if isinstance(report, Landscape):
        return Group(*landscape.render(report))
    if isinstance(report, Evaluation):
        return Group(evaluation.scores_table(report))
    if isinstance(report, Comparison) and report.strategies:
        return Group(*answer(report), *_written(report), Text(), *comparison_table(report))
    if isinstance(report, Result):
        return Group(*_verdict(report), *_written(report))
    if isinstance(report, Inspection):
        columns = ("step", "format", "parameters", "dtype")
        names = shortest_names([Path(row["path"]) for row in report.candidates])
        rows = [
            {"candidate": shown} | {name: row[name] for name in columns}
            for shown, row in zip(names, report.candidates, strict=True)
        ]
        title = f"{counted(len(rows), 'candidate')}, {counted(len(report.left_out), 'file')} left out"
        return Group(_rows(title, rows), *(basin.render(report.basin) if report.basin else ()))
    return Group(Text(str(report)))


def _parts(result: Result) -> Iterator[RenderableType]:
    yield from candidates_table(result)
    if len(result.groups) > 1:
        yield from (Text(), _blocks(result))
    for title, rows in result.tables.items():
        yield from (Text(), _rows(title, rows))
    yield from _verdict(result)
    if isinstance(result, posterior.PosteriorResult):
        yield from posterior.predictions_tables(result)
    if result.cost:
        yield Sentence(_cost(result.cost), "dim")
    yield from _foot(result)


def _verdict(result: Result) -> Iterator[RenderableType]:
    if result.scores:
        yield from (Text(), *_scores(result), Text())
        yield Sentence(result.verdict, "bold red" if result.worse else "bold" if "test" in result.scores else "")
        yield from without_interval(result.gains.values())
    elif result.output:
        yield Text("Nothing was scored: there is no task (--task).", style="bold")


def _written(result: Result) -> Iterator[RenderableType]:
    """Yield the line of the written file, else what a dry run would do."""
    yield from [_wrote(result.output)] if result.output else map(Text, result.warnings)


def _foot(result: Result, *, written: bool = True) -> list[RenderableType]:
    lines = [Sentence(note, "dim", indent=2) for note in _notes(result)]
    file = [Sentence(note, "dim", indent=2) for note in _file_notes(result.output)] if result.output else []
    return [*lines, *([_wrote(result.output, "dim")] if result.output and written else []), *file]


def _blocks(result: Result) -> FittedTable:
    """Build one row per block of tensors: least and greatest coefficient, and all of them as bars in training order."""
    rows = list(zip(*map(coefficients_of, result.candidates), strict=True))
    low, high = min(map(min, rows)), max(map(max, rows))
    bars = [heights(row, low, high) for row in rows]
    return FittedTable(
        title=f"{len(rows)} blocks; ▁ is {low:.3f}, █ is {high:.3f}",
        headings=["tensors", "least", "greatest", "coefficients"], left=("coefficients",),
        rows=[
            [_listing(names), f"{min(row):.3f}", f"{max(row):.3f}", bar]
            for names, row, bar in zip(result.groups, rows, bars, strict=True)
        ],
    )  # fmt: skip


def _rows(title: str, rows: Sequence[Row]) -> FittedTable:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name) for name in columns] for row in rows]
    texts = [[str(value) if isinstance(value, int) else cell(value) for value in row] for row in cells]
    return FittedTable(title=title, headings=columns, rows=texts)


def _scores(result: Result) -> Iterator[RenderableType]:
    own = f"{result.strategy}{' --by-run' if result.settings.get('by_run') else ''}"
    written = "written: best single" if result.replaced else own
    recomputed = "*" if result.output is not None and result.output.recomputed else ""
    rows, held_out = {written: result.scores}, [None if result.replaced else result.held_out]
    for name, scores in result.baselines.items():
        if name.partition("-")[0] != own:  # not lawa-5 beside lawa
            names = {"best": f"best single{recomputed} (step {result.best_step})", "last": f"last{recomputed}"}
            rows[names.get(name, name)] = scores
            fitted = {"best": None, "selection": result.held_out}  # a plain average is chosen on no data
            held_out.append(fitted.get(name, scores[result.scored_on].loss))
    columns = {
        f"{split} {name}": figure_column([scores.get(split) for scores in rows.values()], name)
        for split, score in result.scores.items() for name in score.figures
    }  # fmt: skip
    if result.held_out is not None:
        places = figure_places([scores.get(result.scored_on) for scores in rows.values()], "loss")
        entries = [*columns.items()]
        after = [*columns].index(f"{result.scored_on} loss") + 1
        entries.insert(after, ("held-out loss", ([decimal(loss, places=places) for loss in held_out], "")))
        columns = dict(entries)
    yield FittedTable(
        title="", headings=["scores", *columns],
        rows=[[name, *(cells[i] for cells, _ in columns.values())] for i, name in enumerate(rows)],
        styles=["bold", *[""] * (len(rows) - 1)],
        foot=[ERROR, *(error for _, error in columns.values())],
    )  # fmt: skip
    if recomputed:
        yield Sentence(FOOTNOTE, "dim")


def _notes(result: Result) -> Iterator[str]:
    """Yield the lines below the tables on the data of the scores and the candidate matrix."""
    matrix = result.matrix
    if result.scores:
        if result.holdout is not None:
            percent = f"{result.holdout:.0%}"
            yield f"test is {percent} of the validation data: chosen by a seeded hash, kept out of the search."
        if result.held_out is not None and not result.replaced:
            yield HELD_OUT
        if result.scored_on == "train":
            yield "Scored on training data: the task has no val_dataloader()."
        if any(score.figures.keys() >= {"accuracy", "nll", "brier", "ece"} for score in result.scores.values()):
            yield "ece: expected calibration error of the top label, in 15 bins of equal width"
    if matrix:
        size = f"{matrix.bytes:,} bytes"
        if matrix.group_size is not None:
            yield (
                f"searched at {matrix.bits} bits: the candidate matrix has {size}, and rounding lost "
                f"{matrix.error:.1%} of the candidates' differences; all scores are of exact averages"
            )
        if matrix.offload != "none":
            yield f"searched with --offload {matrix.offload}: candidates streamed through buffers of {size}"
        if matrix.precision != "float32":
            yield f"searched with --precision {matrix.precision}; all scores use the model's own precision"


def _wrote(output: Output, style: str = "") -> Sentence:
    path = printable(str(output.path))
    digest = f"sha256:{output.sha256}" if output.sha256 else output.data_digest
    shown = f", {digest[:23]}…" if digest else ""
    return Sentence(f"wrote {path}: {output.bytes:,} bytes, {output.dtype}{shown}", style, indent=2, path=path)


def _file_notes(output: Output) -> Iterator[str]:
    if output.recomputed:
        yield f"recomputed from data: {_listing(output.recomputed)}"
    if output.derived:
        yield f"recomputed from the averaged weight: {_listing(output.derived)}"
    if output.not_averaged:
        yield f"not averaged, copied from the last selected candidate: {_listing(output.not_averaged)}"
    if output.averaged_buffers:
        kept = "--keep PATTERN copies them from the last selected candidate instead"
        yield f"averaged buffers: {_listing(output.averaged_buffers)} ({kept})"


def _cost(cost: Cost) -> str:
    if not cost.forward_batches:
        return f"cost: {counted(cost.evaluations, 'score')}, {cost.seconds:.1f} s"
    backward = f" and {cost.backward_batches} backward" if cost.backward_batches else ""
    batches = f"{cost.forward_batches} forward{backward} batches"
    passes = "" if cost.passes is None else f"{cost.passes:.0f} passes over the {DATA[cost.passes_over]} data: "
    return f"cost: {passes}{batches}, {cost.seconds:.1f} s"


def _listing(names: Sequence[str]) -> str:
    return printable(", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else ""))
