"""Comparison report for a terminal: one row per strategy, with the winner marked."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ckptavg.report.result import Comparison, Gain, StrategyResult

_MOST = 4  # metrics in a table, so that 80 columns are enough


def comparison_table(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield the table of strategies and the legend of its marks."""
    contestants = comparison.strategies
    judged = list(contestants[0].scores)[-1]
    gains = [contestant.over_last[judged] for contestant in contestants if contestant.name != "last"]
    evidence = judged == "test"
    yield from (
        _table(comparison),
        *_other_metrics(comparison),
        Text(),
        Text(comparison.verdict, style="bold" if evidence else ""),
    )
    if not evidence:
        yield Text(f"over last: on {judged} data, on which strategies chose, so it is no evidence.", style="dim")
    elif with_interval := [gain for gain in gains if gain.low is not None]:
        interval = f"in brackets the 95 % interval over {with_interval[0].units:,} {with_interval[0].unit}"
        zero = "≈ marks a difference whose interval includes zero"
        yield Text(f"over last: on test data, {interval}; {zero}.", style="dim")
    if evidence and any(gain.low is None for gain in gains):
        yield Text("No interval where fewer than 10 examples or batches differ.", style="dim")
    if not all(gain.paired for gain in gains):
        yield Text(
            "The loader gives other examples, or another order, in every pass: differences are not paired.",
            style="yellow",
        )
    epochs = contestants[0].cost.epochs_of
    cost = f"epochs of the {epochs} data, and seconds: cost of the search, as if the strategy had run alone."
    yield Text(f"batches: forward and backward passes; {cost}", style="dim")


def _table(comparison: Comparison) -> Table:
    splits = list(comparison.strategies[0].scores)
    first = comparison.strategies[0].scores[splits[0]]
    batches = any(contestant.cost.forward_batches for contestant in comparison.strategies)
    table = Table(title="strategies", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for split in splits:
        heading = f"{split} {'loss' if first.metric is None else first.name}"
        table.add_column(heading, justify="right", min_width=len(split), overflow="fold")
    # on a narrow terminal the interval wraps below its difference
    table.add_column(f"over last ({splits[-1]})", justify="right", min_width=7)
    table.add_column("", no_wrap=True)
    for heading in ("used", *(("batches f+b", "epochs") if batches else ("scores", "")), "seconds"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=min(7, len(heading)))
    for contestant in _ranked(comparison):
        won, cost = contestant.name == comparison.winner, contestant.cost
        scores = [contestant.scores[split] for split in splits]
        table.add_row(
            f"{'●' if won else ' '} {escape(contestant.name)}",
            *(f"{-score.value if score.metric is None else score.metric:.4f}" for score in scores),
            *(
                ("", "")
                if contestant.name == "last"
                else _gain(contestant.over_last[splits[-1]], evidence=splits[-1] == "test")
            ),
            str(contestant.used),
            f"{cost.forward_batches}+{cost.backward_batches}" if batches else str(cost.evaluations),
            "" if cost.epochs is None else f"{cost.epochs:.1f}",
            f"{cost.seconds:.1f}",
            style="bold" if won and splits[-1] == "test" else None,
        )
    return table


def _ranked(comparison: Comparison) -> list[StrategyResult]:
    split = next(iter(comparison.strategies[0].scores))
    return sorted(comparison.strategies, key=lambda contestant: -contestant.scores[split].value)


def _other_metrics(comparison: Comparison) -> Iterator[Table]:
    """Yield tables of the metrics that decide nothing: value, and below it the gain over last; + is better."""
    split = list(comparison.strategies[0].scores)[-1]
    names = list(comparison.strategies[0].scores[split].others)
    for start in range(0, len(names), _MOST):
        title = f"other metrics on {split} data, below them the gain over last (+ is better)"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in names[start:][:_MOST]:
            table.add_column(escape(name), justify="right", min_width=8, overflow="fold")
        for contestant in _ranked(comparison):
            cells: list[str] = []
            for name in names[start:][:_MOST]:
                value = contestant.scores[split].others[name].metric
                gain = " ".join(_gain(contestant.over_last[split].others[name], evidence=split == "test")).rstrip()
                figure = "" if value is None else f"{value:.4f}"
                cells.append(figure if contestant.name == "last" else f"{figure}\n{gain}")
            table.add_row(f"  {escape(contestant.name)}", *cells)
        yield table


def _gain(gain: Gain, *, evidence: bool) -> tuple[str, str]:
    text = escape(str(gain)) if evidence else f"{gain.value:+.4f}"
    return text, "≈" if gain.low is not None and not gain.separated else ""
