"""Comparison report for a terminal: one row per strategy, with the winner marked."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, Literal

from rich.console import RenderableType
from rich.text import Text

from ckptavg.errors import counted, decimal, printable
from ckptavg.report.digits import ERROR, figure_column, figure_places, gain_places
from ckptavg.report.layout import FittedTable, Sentence
from ckptavg.report.result import Comparison, Gain, StrategyResult
from ckptavg.score import DATA, Split

RECOMPUTED: Final = "BatchNorm recomputed"
HELD_OUT: Final = "held-out loss: validation loss plus the optimism that cross-validation found in the fit"
FOOTNOTE: Final = f"* {RECOMPUTED}: `ckptavg eval` scores the checkpoint as it is"


def answer(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield the verdict and the reason for the figure that decided."""
    yield Sentence(comparison.verdict, "bold" if "test" in comparison.scores else "")
    if comparison.reason:
        yield Sentence(comparison.reason, "dim")


def running_table(rows: Mapping[str, Mapping[str, float]]) -> FittedTable:
    """Build the table of the strategies that have finished so far, from their figures by name."""
    digits = {"passes": 0, "scores": 0, "s": 1}
    names = sorted(
        dict.fromkeys(name for figures in rows.values() for name in figures), key=lambda name: name in digits
    )
    cells = [
        [strategy, *(f"{row[n]:.{digits[n]}f}" if n in digits and n in row else decimal(row.get(n)) for n in names)]
        for strategy, row in rows.items()
    ]
    return FittedTable(title="", headings=["finished", *names], rows=cells)


def comparison_table(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield the table of strategies and the legend of its marks."""
    contestants, output = comparison.strategies, comparison.output
    judged = list(contestants[0].scores)[-1]
    gains = [contestant.over_last[judged] for contestant in contestants if contestant.name != "last"]
    evidence = judged == "test"
    recomputed = output is not None and bool(output.recomputed)
    yield from (_table(comparison, "*" if recomputed else ""), *_other_metrics(comparison), Text())
    yield Sentence("chose on: the data of a strategy's choice, on which its score is optimistic.", "dim")
    if ("held-out", "loss") in _columns(comparison):
        yield Sentence(f"{HELD_OUT}; a plain average has no optimism.", "dim")
    if not evidence:
        text = f"vs last: on {DATA[judged]} data, on which strategies chose, so it is no evidence."
    elif with_interval := [gain for gain in gains if gain.low is not None]:
        interval = f"with its 95 % interval over {with_interval[0].units:,} {with_interval[0].unit}"
        text = f"vs last: difference on test data, {interval}; ≈: the interval includes zero."
    else:
        text = "vs last: difference on test data."
    yield Sentence(text, "dim")
    yield from without_interval(gains if evidence else ())
    if evidence and any(" differ" in gain.reason for gain in gains):
        yield Sentence("No interval where fewer than 10 examples or batches differ.", "dim")
    if not all(gain.paired for gain in gains):
        text = "The loader gives other examples, or another order, in every pass: differences are not paired."
        yield Sentence(text, "yellow")
    cost = contestants[0].cost
    unit = f"passes: over the {DATA[cost.passes_over]} data, a backward pass counts as two"
    unit = "scores: mixtures scored" if cost.passes is None else unit
    yield Sentence(f"{unit}; s: seconds. Each strategy is charged as if it had run alone.", "dim")
    if recomputed:
        yield Sentence(FOOTNOTE, "dim")
    if files := [row.output.path for row in contestants if row.output]:
        yield Sentence(f"wrote {counted(len(files), 'average')} to {printable(str(files[0].parent))}/", "dim")


def without_interval(gains: Collection[Gain]) -> Iterator[Sentence]:
    """Yield how differences get an interval that have none because there are few batches of test data."""
    few = next((gain for gain in gains if gain.reason.startswith("only ")), None)
    if few is not None and "batches" in few.unit:
        own = ", or a loss and metric with one value per example" if few.unit == "batches" else ""
        text = f"An interval needs at least 10 batches of test data, not {few.units}: choose a smaller batch size{own}."
        yield Sentence(text, "dim")


def _table(comparison: Comparison, mark: str) -> FittedTable:
    splits = list(comparison.strategies[0].scores)
    has_passes = any(contestant.cost.passes is not None for contestant in comparison.strategies)
    columns = _columns(comparison)
    rows: list[list[str]] = []
    ranked = _ranked(comparison)
    figures = [_column(ranked, *column) for column in columns]
    judged = [contestant.over_last[splits[-1]] for contestant in ranked if contestant.name != "last"]
    for i, contestant in enumerate(ranked):
        cost, single = contestant.cost, contestant.used == 1
        spent = "" if cost.passes is None else f"{cost.passes:.0f}"
        gain = contestant.over_last[splits[-1]]
        rows.append([
            f"{'●' if contestant.name == comparison.winner else ' '} {contestant.name}{mark if single else ''}",
            {None: "none", "train": "train"}.get(contestant.chose_on, "val"),
            *(cells[i] for cells, _ in figures),
            "" if contestant.name == "last" else _gain(gain, judged, evidence=splits[-1] == "test"),
            _used(contestant),
            spent if has_passes else str(cost.evaluations),
            f"{cost.seconds:.{0 if cost.seconds >= 100 else 1}f}",
        ])  # fmt: skip
    return FittedTable(
        title="strategies",
        headings=[
            "", "chose on", *(f"{split} {name}" for split, name in columns), f"vs last ({splits[-1]})", "used",
            "passes" if has_passes else "scores", "s",
        ],
        rows=rows, left=("chose on", f"vs last ({splits[-1]})"),
        styles=["bold" if c.name == comparison.winner and splits[-1] == "test" else "" for c in ranked],
        foot=[f"  {ERROR}", "", *(error for _, error in figures), "", "", "", ""],
    )  # fmt: skip


def _used(row: StrategyResult) -> str:
    """Return the number of candidates used, with their effective number if the coefficients are not equal."""
    effective = row.effective or row.used
    return str(row.used) if round(effective, 1) == row.used else f"{row.used} (1/Σβ² {effective:.1f})"


def _columns(comparison: Comparison) -> Sequence[tuple[Split | Literal["held-out"], str]]:
    """Return the figures of a row, by data and name: those of the choice, and the metric."""
    rows = comparison.strategies
    first = next(iter(rows[0].scores.values()))
    splits = list(rows[0].scores)
    by_loss = first.loss is not None and (comparison.selected_by != "metric" or first.metric is None)
    columns: list[tuple[Split | Literal["held-out"], str]] = [(split, "loss") for split in splits if by_loss]
    fits = any(row.held_out is not None and row.chose_on for row in rows)
    if by_loss and (fits or comparison.selected_by == "held-out loss"):
        columns.insert(1, ("held-out", "loss"))
    return columns + [(split, first.name) for split in splits if first.metric is not None]


def _column(
    rows: Sequence[StrategyResult], split: Split | Literal["held-out"], name: str
) -> tuple[list[str], str]:  # fmt: skip
    """Return the cells of a figure, and its typical standard error; a held-out loss has the decimals of the fitted."""
    if split != "held-out":
        return figure_column([row.scores[split] for row in rows], name)
    fitted = next(iter(rows[0].scores))
    places = figure_places([row.scores[fitted] for row in rows], name)
    return [decimal(row.held_out, places=places) for row in rows], ""


def _ranked(comparison: Comparison) -> list[StrategyResult]:
    """Return the strategies by the figure that decided; those without one come last, by the score."""
    split, by = next(iter(comparison.strategies[0].scores)), comparison.selected_by

    def rank(row: StrategyResult) -> tuple[bool, float, float]:
        score = row.scores[split]
        loss = row.held_out if by == "held-out loss" else None if score.invalid or by == "metric" else score.loss
        return loss is None, loss or 0.0, -score.value

    return sorted(comparison.strategies, key=rank)


def _other_metrics(comparison: Comparison) -> Iterator[FittedTable]:
    """Yield the metrics that decide nothing: value, and below it the difference to last; + is better."""
    split = list(comparison.strategies[0].scores)[-1]
    names, ranked = list(comparison.strategies[0].scores[split].others), _ranked(comparison)
    rows = [[f"  {contestant.name}"] for contestant in ranked]
    for name in names:
        judged = [contestant.over_last[split].others[name] for contestant in ranked if contestant.name != "last"]
        figures, _ = figure_column([contestant.scores[split] for contestant in ranked], name)
        for contestant, row, figure in zip(ranked, rows, figures, strict=True):
            gain = _gain(contestant.over_last[split].others[name], judged, evidence=split == "test")
            row.append(figure if contestant.name == "last" else f"{figure}\n{gain}")
    if names:
        title = f"other metrics on {DATA[split]} data, below them the difference to last (+ is better)"
        yield FittedTable(title=title, headings=["", *names], rows=rows)


def _gain(gain: Gain, column: Sequence[Gain], *, evidence: bool) -> str:
    """Return a difference with as many decimals as the others of its column."""
    places = gain_places(column)
    if gain.low is None or not evidence:
        return decimal(gain.value, "+", places)
    return f"{gain.text(places)}{'' if gain.separated else ' ≈'}"
