"""Report for a terminal: candidates, scores, verdict and cost."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from ckptavg.checkpoints.checkpoint import shortest_names
from ckptavg.cost import Cost
from ckptavg.errors import counted, decimal, printable
from ckptavg.report import basin, evaluation, landscape, posterior
from ckptavg.report.comparison import FOOTNOTE, HELD_OUT, RECOMPUTED, answer, comparison_table, without_interval
from ckptavg.report.display import Report
from ckptavg.report.layout import FittedTable, Sentence
from ckptavg.report.result import CandidateResult, Comparison, Evaluation, Inspection, Landscape, Output, Result, Row
from ckptavg.score import DATA, Score, Split

_BARS = "▁▂▃▄▅▆▇█"
_MOST = 40  # candidates of one strategy that are all shown
_FEW = 12  # candidates that are shown of more than that, or of a comparison


def render(report: Report) -> Group:
    """Render the whole report, from the candidates to the written file."""
    if not isinstance(report, Result):
        return summary(report)
    if isinstance(report, Comparison) and report.strategies:
        table = (Text(), *comparison_table(report), Text(), *_candidates(report))
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
    yield from _candidates(result)
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


def _written(result: Result) -> Iterator[Text]:
    """Yield the line of the written file, else what a dry run would do."""
    yield from map(Text, [*_file_notes(result.output)][:1] if result.output else result.warnings)


def _foot(result: Result, *, written: bool = True) -> list[RenderableType]:
    file = [*_file_notes(result.output)][0 if written else 1 :] if result.output else []
    return [Sentence(note, "dim", indent=2) for note in (*_notes(result), *file)]


def _shown(result: Result) -> Sequence[int]:
    """Return the candidates to show: all, or the best and the last single one and those of the largest coefficients."""
    n, candidates = len(result.candidates), result.candidates
    if n <= (_FEW if isinstance(result, Comparison) else _MOST):
        return range(n)
    scored = [i for i in range(n) if candidates[i].score is not None]
    best = max(scored, key=lambda i: (getattr(candidates[i].score, "value", 0.0), i), default=n - 1)
    order = sorted(range(n), key=lambda i: (i not in (best, n - 1), -max(map(abs, _coefficients(candidates[i]))), -i))
    return sorted(i for i in order[:_FEW] if i in (best, n - 1) or any(_coefficients(candidates[i])))


def _candidates(result: Result) -> Iterator[RenderableType]:
    """Yield the table of the candidates, and what its columns mean."""
    scores = [candidate.score for candidate in result.candidates]
    figures = list(dict.fromkeys(name for score in scores if score is not None for name in score.figures))
    columns = list(dict.fromkeys(name for candidate in result.candidates for name in candidate.columns))
    columns = [name for name in columns if name != "alone" or not figures]  # the candidate's own score is in `figures`
    recomputed = f", {RECOMPUTED}" if figures and result.output is not None and result.output.recomputed else ""
    rows: list[list[str]] = []
    chosen: list[bool] = []
    shown, n = _shown(result), len(result.candidates)
    names = shortest_names([candidate.path for candidate in result.candidates])
    for i in shown:
        name, candidate = names[i], result.candidates[i]
        coefficients = _coefficients(candidate)
        chosen.append(result.output is not None and candidate.coefficient != 0)
        several = f" … {max(coefficients):.3f}" if len(coefficients) > 1 else ""
        rows.append([
            name,
            str(candidate.step),
            *(_cell(candidate.columns.get(name)) for name in columns),
            *(_cell(candidate.score and candidate.score.figures.get(name)) for name in figures),
            f"● {min(coefficients):.3f}{several}" if chosen[-1] else "",
        ])  # fmt: skip
    yield FittedTable(
        title=f"{'' if len(shown) == n else f'{len(shown)} of '}{counted(n, 'candidate')}{recomputed}",
        headings=["candidate", "step", *columns, *figures, ""], rows=rows, left=("",),
        styles=["" if used or result.output is None else "dim" for used in chosen],
    )  # fmt: skip
    if len(shown) < n:
        yield Sentence(f"… and {n - len(shown):,} more: --json lists all", "dim")
    yield from (Sentence(line, "dim") for line in _legend(result, columns))


def _legend(result: Result, columns: Collection[str]) -> Iterator[str]:
    """Yield the meaning of a strategy's columns, and how many candidates have the weight."""
    used = sum(candidate.coefficient != 0 for candidate in result.candidates)
    if result.output is not None and result.effective is not None and round(result.effective, 1) != used:
        yield f"effective number of candidates 1/Σβ²: {result.effective:.1f} of {used}"
    if "alone" in columns:
        yield "alone: score of the candidate by itself"
    if "if added" in columns:
        yield "if added: score of the average with this candidate in it"
    if any(candidate.columns.get("decision") in ("soft", "hard") for candidate in result.candidates):
        yield "decision: soft joins the average, hard restarts it, reject is left out"
    if "s" in columns and not result.replaced:
        order = sorted(result.candidates, key=lambda candidate: float(candidate.columns["s"] or 0.0))
        chosen = [candidate for candidate in order if candidate.coefficient != 0]
        likeliest = order[-len(chosen) :]
        if {id(candidate) for candidate in chosen} != {id(candidate) for candidate in likeliest}:
            other = f"The {len(chosen)} selected are not those of the largest s"
            yield f"s: probability of being selected. {other}: their average is the best of all that were scored."
        else:
            yield "s: probability of being selected"


def _coefficients(candidate: CandidateResult) -> Sequence[float]:
    return candidate.coefficient if isinstance(candidate.coefficient, tuple) else (candidate.coefficient,)


def _cell(value: float | str | None) -> str:
    return value if isinstance(value, str) else decimal(value)


def _blocks(result: Result) -> FittedTable:
    """Build one row per block of tensors: least and greatest coefficient, and all of them as bars in training order."""
    rows = list(zip(*map(_coefficients, result.candidates), strict=True))
    low, high = min(map(min, rows)), max(map(max, rows))
    bars = ["".join(_BARS[round((c - low) / (high - low or 1) * (len(_BARS) - 1))] for c in row) for row in rows]
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
    texts = [[str(cell) if isinstance(cell, int) else _cell(cell) for cell in row] for row in cells]
    return FittedTable(title=title, headings=columns, rows=texts)


def _scores(result: Result) -> Iterator[RenderableType]:
    own = f"{result.strategy}{' --by-run' if result.settings.get('by_run') else ''}"
    written = "written: best single" if result.replaced else own
    recomputed = "*" if result.output is not None and result.output.recomputed else ""
    rows = {written: _figures(result.scores)}
    rows[written]["held-out loss"] = None if result.replaced else result.held_out
    for name, scores in result.baselines.items():
        if name.partition("-")[0] != own:  # not lawa-5 beside lawa
            names = {"best": f"best single{recomputed} (step {result.best_step})", "last": f"last{recomputed}"}
            held_out = {"best": None, "selection": result.held_out}  # a plain average is chosen on no data
            rows[names.get(name, name)] = {
                **_figures(scores), "held-out loss": held_out.get(name, scores[result.scored_on].loss)
            }  # fmt: skip
    columns = [*_figures(result.scores)]
    if result.held_out is not None:
        columns.insert(columns.index(f"{result.scored_on} loss") + 1, "held-out loss")
    yield FittedTable(
        title="", headings=["scores", *columns],
        rows=[[name, *(_cell(figures.get(column)) for column in columns)] for name, figures in rows.items()],
        styles=["bold", *[""] * (len(rows) - 1)],
    )  # fmt: skip
    if recomputed:
        yield Sentence(FOOTNOTE, "dim")


def _figures(scores: Mapping[Split, Score]) -> dict[str, float | None]:
    return {f"{split} {name}": value for split, score in scores.items() for name, value in score.figures.items()}


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


def _file_notes(output: Output) -> Iterator[str]:
    path = printable(str(output.path))
    digest = f"sha256:{output.sha256}" if output.sha256 else output.data_digest
    shown = f", {digest[:23]}…" if digest else ""
    yield f"wrote {path}: {output.bytes:,} bytes, {output.dtype}{shown}"
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
