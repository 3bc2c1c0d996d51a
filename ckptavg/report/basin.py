"""Which candidates average: midpoints of neighbours, the barriers among them, and their table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from ckptavg.checkpoints.checkpoint import shortest_names
from ckptavg.errors import decimal, printable
from ckptavg.report.digits import figure_places, gain_places
from ckptavg.report.layout import FittedTable, Sentence
from ckptavg.score import DATA, Score, Split

if TYPE_CHECKING:
    from ckptavg.report.result import Gain


@dataclass(frozen=True, kw_only=True)
class BasinCandidate:
    """A candidate: its score alone, its run and its basin, from 1; None if it is set aside."""

    path: Path
    step: int
    run: int
    score: Score
    basin: int | None


@dataclass(frozen=True, kw_only=True)
class Midpoint:
    """The mean of two candidates.

    Attributes:
        candidates: the two, as indices.
        steps: their steps.
        barrier: how much worse it scores than the mean of its two ends; None if one of the three is not finite.
        threshold: the height that this, or the lower end of its interval, must exceed to separate; None likewise.
        separates: whether that is a barrier: more than noise, so that the two do not average.
        harms: whether there is no barrier, but it scores worse than the better end alone, by 2 % and more than noise.
    """

    candidates: tuple[int, int]
    steps: tuple[int, int]
    score: Score
    barrier: Gain | None
    threshold: float | None
    separates: bool
    harms: bool


@dataclass(frozen=True, kw_only=True)
class Basins:
    """Basins of the candidates; see `ckptavg.pipeline.basin.find_basins`.

    Attributes:
        name: the figure that was measured: the loss, or the score where there is none.
        midpoints: those of neighbours, of the runs' last candidates, and of others that were needed.
    """

    name: str
    scored_on: Split
    candidates: Sequence[BasinCandidate]
    midpoints: Sequence[Midpoint]
    verdict: str
    notes: Sequence[str] = ()


def render(basins: Basins) -> Iterator[RenderableType]:
    """Yield the table of candidates and of midpoints with the next one of the run, other midpoints, and the verdict."""
    names = [printable(name) for name in shortest_names([candidate.path for candidate in basins.candidates])]
    by_run = sorted(range(len(names)), key=lambda i: basins.candidates[i].run)
    scored = [i for i in by_run if basins.candidates[i].basin is not None]
    following = {a: b for a, b in pairwise(scored) if _run(basins, a) == _run(basins, b)}
    next_to = {m.candidates[0]: m for m in basins.midpoints if following.get(m.candidates[0]) == m.candidates[1]}
    several = len({candidate.run for candidate in basins.candidates}) > 1
    gains = [midpoint.barrier for midpoint in basins.midpoints if midpoint.barrier is not None]
    places = figure_places([one.score for one in (*basins.candidates, *basins.midpoints)], basins.name)
    decimals = gain_places(gains)
    rows: list[list[str]] = []
    for i in by_run:
        candidate, midpoint = basins.candidates[i], next_to.get(i)
        cells = ["", "", ""] if midpoint is None else [_figure(midpoint.score, places), *_barrier(midpoint, decimals)]
        run = [str(candidate.run)] if several else []
        figure = _figure(candidate.score, places)
        rows.append([names[i], *run, str(candidate.step), figure, *cells, str(candidate.basin or "")])
    yield FittedTable(
        title=f"{basins.name} on {DATA[basins.scored_on]} data",
        headings=["candidate", *["run"] * several, "step", basins.name, "midpoint with next", "barrier", "", "basin"],
        rows=rows,
        left=("",), styles=["bold red" if i in next_to and next_to[i].separates else "" for i in by_run],
    )  # fmt: skip
    for midpoint in basins.midpoints:
        if midpoint not in next_to.values():
            pair = " and ".join(names[i] for i in midpoint.candidates)
            words = " ".join(filter(None, _barrier(midpoint, decimals)))
            yield Sentence(f"midpoint of {pair}: {_figure(midpoint.score, places)}, {words}", "dim")
    if basins.midpoints:
        worse = "above" if basins.name == "loss" else "worse than"
        text = f"barrier: {basins.name} of the midpoint {worse} the mean of its two ends"
        interval = any(m.barrier is not None and m.barrier.low is not None for m in basins.midpoints)
        yield Sentence(f"{text}{', with its 95 % interval' if interval else ''}", "dim")
    yield from (Sentence(printable(note), "yellow") for note in basins.notes)
    yield from (Text(), Sentence(printable(basins.verdict), "bold"))


def _run(basins: Basins, i: int) -> int:
    return basins.candidates[i].run


def _figure(score: Score, places: int) -> str:
    if score.invalid:
        return "not finite"
    return decimal(next(iter(score.figures.values())), places=places)


def _barrier(midpoint: Midpoint, places: int) -> list[str]:
    """Return the barrier with its interval, and the mark of one that separates."""
    gain, mark = midpoint.barrier, "← barrier" if midpoint.separates else ""
    if gain is None:
        return ["", mark]
    return [gain.text(places), mark]
