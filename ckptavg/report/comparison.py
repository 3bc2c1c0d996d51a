"""Comparison report for a terminal: one row per strategy, with the winner marked."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ckptavg.report.result import Comparison, Gain, StrategyResult
from ckptavg.score import Score, Split


def comparison_table(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield the table of strategies and the legend of its marks."""
    splits = list(comparison.contestants[0].scores)
    judged = splits[-1]
    yield _table(comparison, splits)
    yield Text()
    yield Text(comparison.result.verdict, style="bold")
    if comparison.contestants[0].gains[judged].low is None:
        yield Text(
            f"over last: on {judged} data; an interval needs a loss or metric for each of at least 20 examples.",
            style="dim",
        )
        return
    yield Text(
        f"over last: on {judged} data, in brackets the paired-bootstrap 95 % interval over "
        f"{comparison.contestants[0].gains[judged].units:,} {_units(comparison, judged)}; "
        "≈ marks a difference whose interval includes zero.",
        style="dim",
    )
    if not all(contestant.gains[judged].paired for contestant in comparison.contestants):
        yield Text("The loader changes the order of its examples between passes: not paired.", style="yellow")
    yield Text("epochs and seconds: cost of the search, as if the strategy had run alone.", style="dim")


def _table(comparison: Comparison, splits: list[Split]) -> Table:
    table = Table(title="strategies", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    metric = next(iter(comparison.contestants[0].scores.values())).metric is not None
    for split in splits:
        table.add_column(
            f"{split} {'metric' if metric else 'loss'}", justify="right", min_width=len(split), overflow="fold"
        )
    batches = any(contestant.cost.forward_batches for contestant in comparison.contestants)
    costs = ("batches f+b", "epochs", "seconds") if batches else ("scores", "", "seconds")
    for heading in (f"over last ({splits[-1]})", "", "used", *costs):
        # on a narrow terminal the interval wraps below its difference
        fixed = not heading.startswith("over last")
        table.add_column(
            heading, justify="left" if heading == "" else "right", no_wrap=fixed, min_width=min(7, len(heading))
        )
    for contestant in sorted(comparison.contestants, key=lambda contestant: -contestant.scores[splits[0]].value):
        won, cost = contestant.name == comparison.winner, contestant.cost
        figures = ("", "") if contestant.name == "last" else _gain(contestant.gains[splits[-1]])
        table.add_row(
            f"{'●' if won else ' '} {escape(contestant.name)}",
            *(_score(contestant.scores[split]) for split in splits),
            *figures,
            str(contestant.used),
            f"{cost.forward_batches}+{cost.backward_batches}" if batches else str(cost.evaluations),
            "" if cost.epochs is None else f"{cost.epochs:.1f}",
            f"{cost.seconds:.1f}",
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
    first: StrategyResult = comparison.contestants[0]
    return "examples" if first.gains[split].units == first.scores[split].examples else "batches"
