"""Comparison report for a terminal: one row per strategy, with the winner marked."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ckptavg.report.result import Comparison, Gain


def comparison_table(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield the table of strategies and the legend of its marks."""
    contestants = comparison.contestants
    judged, score = list(contestants[0].scores.items())[-1]
    gain = contestants[0].gains[judged]
    yield from (_table(comparison), Text(), Text(comparison.result.verdict, style="bold"))
    legend = f"over last: on {judged} data"
    if gain.low is None:
        yield Text(f"{legend}; an interval needs a loss or metric for each of at least 20 examples.", style="dim")
        return
    units = f"{gain.units:,} {'examples' if gain.units == score.examples else 'batches'}"
    interval = f"in brackets the paired-bootstrap 95 % interval over {units}"
    yield Text(f"{legend}, {interval}; ≈ marks a difference whose interval includes zero.", style="dim")
    if not all(contestant.gains[judged].paired for contestant in contestants):
        yield Text("The loader changes the order of its examples between passes: not paired.", style="yellow")
    yield Text("epochs and seconds: cost of the search, as if the strategy had run alone.", style="dim")


def _table(comparison: Comparison) -> Table:
    splits = list(comparison.contestants[0].scores)
    metric = comparison.contestants[0].scores[splits[0]].metric is not None
    batches = any(contestant.cost.forward_batches for contestant in comparison.contestants)
    table = Table(title="strategies", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for split in splits:
        heading = f"{split} {'metric' if metric else 'loss'}"
        table.add_column(heading, justify="right", min_width=len(split), overflow="fold")
    # on a narrow terminal the interval wraps below its difference
    table.add_column(f"over last ({splits[-1]})", justify="right", min_width=7)
    table.add_column("", no_wrap=True)
    for heading in ("used", *(("batches f+b", "epochs") if batches else ("scores", "")), "seconds"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=min(7, len(heading)))
    for contestant in sorted(comparison.contestants, key=lambda contestant: -contestant.scores[splits[0]].value):
        won, cost = contestant.name == comparison.winner, contestant.cost
        scores = [contestant.scores[split] for split in splits]
        table.add_row(
            f"{'●' if won else ' '} {escape(contestant.name)}",
            *(f"{-score.value if score.metric is None else score.metric:.4f}" for score in scores),
            *(("", "") if contestant.name == "last" else _gain(contestant.gains[splits[-1]])),
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
