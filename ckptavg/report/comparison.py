"""The report of a comparison for a terminal: one row a strategy, the winner marked."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ckptavg.report.result import Comparison, Gain, StrategyResult
from ckptavg.score import Score, Split


def comparison_table(comparison: Comparison) -> Iterator[RenderableType]:
    """The table of strategies, and what its marks mean."""
    splits = list(comparison.contestants[0].scores)
    judged = splits[-1]
    yield _table(comparison, splits)
    yield Text()
    yield Text(comparison.result.verdict, style="bold")
    if comparison.contestants[0].gains[judged].low is None:
        yield Text(
            f"over last: on {judged} data; an interval takes a loss or metric for each of at least 20 examples.",
            style="dim",
        )
        return
    yield Text(
        f"over last: on {judged} data, in brackets the paired-bootstrap 95 % interval over "
        f"{comparison.contestants[0].gains[judged].units:,} {_units(comparison, judged)}; "
        "≈ is a difference it does not separate from zero.",
        style="dim",
    )
    if not all(one.gains[judged].paired for one in comparison.contestants):
        yield Text("The loader gives its examples in another order each time: nothing could be paired.", style="yellow")
    yield Text("epochs and seconds: of the search, as if it had run alone.", style="dim")


def _table(comparison: Comparison, splits: list[Split]) -> Table:
    table = Table(title="strategies", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    metric = next(iter(comparison.contestants[0].scores.values())).metric is not None
    for split in splits:
        table.add_column(
            f"{split} {'metric' if metric else 'loss'}", justify="right", min_width=len(split), overflow="fold"
        )
    batches = any(one.cost.forward_batches for one in comparison.contestants)
    costs = ("passes f+b", "epochs", "seconds") if batches else ("scores", "", "seconds")
    for heading in (f"over last ({splits[-1]})", "", "used", *costs):
        # where there is little room, an interval goes below its difference
        fixed = not heading.startswith("over last")
        table.add_column(
            heading, justify="left" if heading == "" else "right", no_wrap=fixed, min_width=min(7, len(heading))
        )
    for one in sorted(comparison.contestants, key=lambda one: -one.scores[splits[0]].value):
        won = one.name == comparison.winner
        figures = ("", "") if one.name == "last" else _gain(one.gains[splits[-1]])
        table.add_row(
            f"{'●' if won else ' '} {escape(one.name)}",
            *(_score(one.scores[split]) for split in splits),
            *figures,
            str(one.used),
            f"{one.cost.forward_batches}+{one.cost.backward_batches}" if batches else str(one.cost.evaluations),
            "" if one.cost.epochs is None else f"{one.cost.epochs:.1f}",
            f"{one.cost.seconds:.1f}",
            style="bold" if won else None,
        )
    return table


def _gain(gain: Gain) -> tuple[str, str]:
    if gain.low is None:
        return f"{gain.value:+.4f}", ""
    return f"{gain.value:+.4f} \\[{gain.low:+.4f}, {gain.high:+.4f}]", "" if gain.separated else "≈"


def _score(score: Score) -> str:
    return f"{-score.value if score.metric is None else score.metric:.4f}"


def _units(comparison: Comparison, split: Split) -> str:
    one: StrategyResult = comparison.contestants[0]
    return "examples" if one.gains[split].units == one.scores[split].examples else "batches"
