"""Table of the candidates: scores alone, a strategy's columns, and coefficients as numbers and bars."""

from collections.abc import Collection, Iterator, Sequence
from typing import Final

from rich.console import RenderableType

from ckptavg.checkpoints.checkpoint import shortest_names
from ckptavg.errors import counted, decimal
from ckptavg.report.bars import Sparkline
from ckptavg.report.comparison import RECOMPUTED
from ckptavg.report.digits import ERROR, figure_column, figure_places
from ckptavg.report.layout import FittedTable, Sentence
from ckptavg.report.result import CandidateResult, Comparison, Result

_SCORES: Final = ("alone", "if added")  # columns of strategies that have scores
_MOST: Final = 40  # candidates of one strategy that are all shown
_FEW: Final = 12  # candidates that are shown of more than that, or of a comparison


def candidates_table(result: Result) -> Iterator[RenderableType]:
    """Yield the line of their scores and the table of the candidates, and what its columns mean."""
    scores = [candidate.score for candidate in result.candidates]
    figures = list(dict.fromkeys(name for score in scores if score is not None for name in score.figures))
    column = {name: figure_column(scores, name) for name in figures}
    columns = list(dict.fromkeys(name for candidate in result.candidates for name in candidate.columns))
    columns = [name for name in columns if name != "alone" or not figures]  # the candidate's own score is in `figures`
    recomputed = f", {RECOMPUTED}" if figures and result.output is not None and result.output.recomputed else ""
    rows: list[list[str]] = []
    shown, n = _shown(result), len(result.candidates)
    names = shortest_names([candidate.path for candidate in result.candidates])
    chosen = [result.output is not None and result.candidates[i].coefficient != 0 for i in shown]
    places = figure_places(scores, figures[0]) if figures else 4
    numbers = dict(zip(shown, _numbers([result.candidates[i] for i in shown]), strict=True))
    for i, used in zip(shown, chosen, strict=True):
        candidate = result.candidates[i]
        rows.append([
            names[i],
            str(candidate.step),
            *(cell(candidate.columns.get(name), places if name in _SCORES else 4) for name in columns),
            *(column[name][0][i] for name in figures),
            f"● {numbers[i]}" if used else "",
        ])  # fmt: skip
    if any(column[name][1] for name in figures):
        foot = [ERROR, "", *("" for _ in columns), *(column[name][1] for name in figures), ""]
    else:
        foot = []
    yield from _sparkline(result, places)
    yield FittedTable(
        title=f"{'' if len(shown) == n else f'{len(shown)} of '}{counted(n, 'candidate')}{recomputed}",
        headings=["candidate", "step", *columns, *figures, ""], rows=rows, left=("",), foot=foot,
        styles=["" if used or result.output is None else "dim" for used in chosen],
        bars=_bars(result, shown) if any(chosen) else (),
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


def coefficients_of(candidate: CandidateResult) -> Sequence[float]:
    """Return the coefficients of a candidate: one for each block of tensors."""
    return candidate.coefficient if isinstance(candidate.coefficient, tuple) else (candidate.coefficient,)


def _numbers(candidates: Sequence[CandidateResult]) -> list[str]:
    """Return the coefficients, aligned at the decimal point; of several blocks of tensors the least and greatest."""
    ranges = [(f"{min(c):.3f}", f" … {max(c):.3f}" if len(c) > 1 else "") for c in map(coefficients_of, candidates)]
    width = max(len(least) for least, _ in ranges)
    return [f"{least:>{width}}{greatest}" for least, greatest in ranges]


def _bars(result: Result, shown: Sequence[int]) -> Sequence[float]:
    """Return the coefficients to draw as bars; none if they are all equal, or several for each candidate."""
    drawn = [c for c in (result.candidates[i].coefficient for i in shown) if isinstance(c, float | int)]
    return drawn if len(drawn) == len(shown) and len(set(drawn)) > 1 else ()


def _sparkline(result: Result, places: int) -> Iterator[Sparkline]:
    """Yield the line of the scores over steps, if the candidates were scored."""
    scores = {i: score for i, c in enumerate(result.candidates) if (score := c.score) is not None and not score.invalid}
    if scores:
        best = max(scores, key=lambda i: (scores[i].value, i))
        name = next(iter(scores[best].figures))
        values = [scores[i].figures.get(name) if i in scores else None for i in range(len(result.candidates))]
        steps = [candidate.step for candidate in result.candidates]
        yield Sparkline(name=name, steps=steps, values=values, best=best, places=places)


def _shown(result: Result) -> Sequence[int]:
    """Return the candidates to show: all, or the best and the last single one and those of the largest coefficients."""
    n, candidates = len(result.candidates), result.candidates
    if n <= (_FEW if isinstance(result, Comparison) else _MOST):
        return range(n)
    scored = [i for i in range(n) if candidates[i].score is not None]
    best = max(scored, key=lambda i: (getattr(candidates[i].score, "value", 0.0), i), default=n - 1)
    order = sorted(range(n), key=lambda i: (i not in (best, n - 1), -max(map(abs, coefficients_of(candidates[i]))), -i))
    return sorted(i for i in order[:_FEW] if i in (best, n - 1) or any(coefficients_of(candidates[i])))


def cell(value: float | str | None, places: int = 4) -> str:
    """Return a value of a strategy's column as text."""
    return value if isinstance(value, str) else decimal(value, places=places)
