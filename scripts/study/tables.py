"""Tables of the study in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from study.interval import Interval
from study.record import Row
from study.setting import Setting

NONE = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose other columns are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def domain_table(one: Setting) -> str:
    """Return the table of all strategies on one domain with one schedule."""
    head = ["strategy", "used", "val loss", "test loss", one.domain.figure]
    head += ["Δ from last", "Δ from SWA", "rank", "epochs", "seconds", "of training"]
    return table(head, [_strategy(one, label) for label in one.labels])


def _strategy(one: Setting, label: str) -> list[str]:
    rows = one.rows(label)
    digits = digits_of(one)
    return [
        label,
        f"{fmean(row.used for row in rows):.1f}",
        f"{fmean(row.val_loss for row in rows):.4f}",
        f"{fmean(row.test_loss for row in rows):.4f}",
        f"{one.domain.scale * fmean(row.figure for row in rows):.{digits}f}",
        NONE if label == "last" else shown(one.difference(label, "last"), digits),
        NONE if label == "SWA" else shown(one.difference(label, "SWA"), digits),
        _ranks(rows),
        *_cost(one, rows),
    ]


def _ranks(rows: Sequence[Row]) -> str:
    ranks = [row.rank for row in rows if row.rank is not None]
    if not ranks:
        return NONE
    some = "" if len(ranks) == len(rows) else f", of {len(ranks)} seeds"
    return f"{median(ranks):g} ({min(ranks)}–{max(ranks)}{some})"


def _cost(one: Setting, rows: Sequence[Row]) -> list[str]:
    epochs = [row.epochs for row in rows if row.epochs is not None]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    if not seconds or not epochs:
        return [NONE, NONE, NONE]
    share = fmean(seconds) / fmean(record.seconds for record in one.records)
    return [f"{fmean(epochs):.1f}", f"{fmean(seconds):.2f}", f"{share:.0%}"]


def digits_of(one: Setting) -> int:
    """Return the number of decimals: a loss in nats needs more than a percentage."""
    return 4 if one.domain.figure.startswith("−") else 2


def shown(interval: Interval | None, digits: int) -> str:
    """Format an interval; a dash for None."""
    return NONE if interval is None else f"{interval:.{digits}f}"


def overview(found: Sequence[Setting]) -> list[str]:
    """Return, for each strategy, the number of settings with a significant difference, its mean place, and its cost."""
    labels = list(dict.fromkeys(label for one in found for label in one.labels))
    places = [one.places() for one in found]
    by_loss = [one.places(lambda row: -row.test_loss) for one in found]
    rows: list[tuple[float, list[str]]] = []
    for label in labels:
        mine, also = ([place[label] for place in each if label in place] for each in (places, by_loss))
        changes = [change for one in found for change in one.loss_changes(label)]
        costs = [row.epochs for one in found for row in one.rows(label) if row.epochs is not None]
        row = [
            label,
            f"{fmean(mine):.1f}" if mine else NONE,
            f"{fmean(also):.1f}" if also else NONE,
            *_tally(found, label, "last"),
            *_tally(found, label, "SWA"),
            f"{fmean(changes):+.1%}" if label != "SWA" else NONE,
            f"{max(changes):+.1%}" if label != "SWA" else NONE,
            f"{median(costs):.1f}" if costs and mine else NONE,
        ]
        rows.append((fmean(mine) if mine else math.inf, row))
    rows.sort(key=lambda row: row[0])
    head = ["strategy", "mean place", "by test loss", "above last", "below last", "above SWA", "below SWA"]
    head += ["test loss against SWA", "worst training", "epochs, median"]
    ran = max(len(place) for place in places)
    text = (
        f"*Place* is the position by test figure among the {ran} strategies, averaged over {len(found)} settings and "
        "their seeds (ties share a place), *by test loss* the one by that. *Above* and *below* count the settings in "
        "which the 95 % interval of the paired difference of the test figure excludes zero. Differences of the test "
        "loss are in percent of that of SWA: the mean over all trainings, and the largest."
    )
    return [text, table(head, [row for _, row in rows]), *_agreement(found)]


def _tally(found: Sequence[Setting], label: str, other: str) -> list[str]:
    if label == other:
        return [NONE, NONE]
    signs = [one.difference(label, other) for one in found]
    return [str(sum(sign is not None and sign.sign == wanted for sign in signs)) for wanted in (1, -1)]


def _agreement(found: Sequence[Setting]) -> list[str]:
    rows: list[list[str]] = []
    for one in found:
        values = one.agreement()
        low_high = f"{min(values):.2f} to {max(values):.2f}" if values else NONE
        picks = f"{one.picks()} of {len(one.records)}"
        rows.append([one.title, f"{fmean(values):.2f}" if values else NONE, low_high, picks])
    text = (
        "Does the validation loss, which strategies learn from, predict the test figure? Spearman's correlation of the "
        "two (with signs such that 1 is agreement) over single candidates and random subsets, and the number of seeds "
        "in which the strategy with the lowest validation loss had the highest test figure."
    )
    return [
        "### Where validation loss and test figure disagree",
        text,
        table(["setting", "Spearman, mean", "over seeds", "lowest loss is best"], rows),
    ]
