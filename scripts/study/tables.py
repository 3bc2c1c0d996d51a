"""Tables of the study in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median

from study.interval import Interval
from study.record import Row
from study.setting import Setting

NONE = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose other columns are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def folded(summary: str, text: str) -> str:
    """Return a part that a reader opens."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def setting_table(one: Setting) -> str:
    """Return the table of all strategies in one setting."""
    also = one.also
    ranked = any(row.rank is not None for label in one.labels for row in one.rows(label))
    head = ["strategy", "used", one.domain.figure, *also, "Δ from last", "Δ from SWA", "val loss", "test loss"]
    head += [*(["rank"] if ranked else []), "epochs", "seconds", "of training"]
    return table(head, [_strategy(one, label, also, ranked) for label in one.labels])


def _strategy(one: Setting, label: str, also: Sequence[str], ranked: bool) -> list[str]:
    rows = one.rows(label)
    digits = digits_of(one)
    used = [row.used for row in rows if row.used is not None]
    return [
        label,
        f"{fmean(used):.1f}" if used else NONE,
        f"{one.domain.scale * fmean(row.figure for row in rows):.{digits}f}",
        *(f"{fmean(row.also[name] for row in rows):.4g}" if name in rows[0].also else NONE for name in also),
        NONE if label == "last" else shown(one.difference(label, "last"), digits),
        NONE if label == "SWA" else shown(one.difference(label, "SWA"), digits),
        f"{fmean(row.val_loss for row in rows):.4f}",
        f"{fmean(row.test_loss for row in rows):.4f}",
        *([_ranks(rows)] if ranked else []),
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
    """Return the number of decimals: a loss in nats and a reciprocal rank need more than a percentage."""
    return 4 if one.domain.scale * one.magnitude < 10 else 2


def shown(interval: Interval | None, digits: int) -> str:
    """Format an interval; a dash for None."""
    return NONE if interval is None else f"{interval:.{digits}f}"


def places(found: Sequence[Setting], better: Callable[[Row], float] | None = None) -> dict[str, dict[str, float]]:
    """Return label → area → mean place; every setting of an area counts the same."""
    areas: dict[str, list[Mapping[str, float]]] = {}
    for one in found:
        areas.setdefault(one.domain.area, []).append(one.places() if better is None else one.places(better))
    labels = list(dict.fromkeys(label for each in areas.values() for place in each for label in place))
    return {
        label: {
            area: fmean(mine)
            for area, each in areas.items()
            if (mine := [place[label] for place in each if label in place])
        }
        for label in labels
    }


def overview(found: Sequence[Setting]) -> str:
    """Return the table of all strategies over all settings, the best mean place first."""
    labels = [label for one in found for label in one.labels if label not in {*one.peers, *one.own}]
    labels = list(dict.fromkeys(labels))
    by_figure, by_loss = places(found), places(found, lambda row: -row.test_loss)
    rows: list[tuple[float, list[str]]] = []
    for label in labels:
        mine, also = (list(each.get(label, {}).values()) for each in (by_figure, by_loss))
        changes = _by_area(found, lambda one, label=label: one.loss_changes(label))
        passes = _by_area(found, lambda one, label=label: one.shares(label, lambda of: of.epochs))
        seconds = _by_area(found, lambda one, label=label: one.shares(label, lambda of: of.seconds))
        row = [
            label,
            f"{fmean(mine):.1f}" if mine else NONE,
            f"{fmean(also):.1f}" if also else NONE,
            *(tally(found, label, other) for other in ("SWA", "last", "best")),
            f"{fmean(changes):+.1%}" if label != "SWA" else NONE,
            f"{max(changes):+.1%}" if label != "SWA" else NONE,
            *(f"{fmean(each):.0%}" if each and mine else NONE for each in (passes, seconds)),
        ]
        rows.append((fmean(mine) if mine else math.inf, row))
    rows.sort(key=lambda row: row[0])
    head = ["strategy", "mean place", "by test loss", "SWA", "last", "best", "test loss against SWA", "worst area"]
    return table([*head, "passes", "seconds"], [row for _, row in rows])


def _by_area(found: Sequence[Setting], of: Callable[[Setting], Sequence[float]]) -> list[float]:
    """Return the median over the trainings of each area."""
    areas = [[one for one in found if one.domain.area == area] for area in dict.fromkeys(o.domain.area for o in found)]
    values = [[value for one in mine for value in of(one)] for mine in areas]
    return [median(each) for each in values if each]


def tally(found: Sequence[Setting], label: str, other: str) -> str:
    """Count the settings in which ``label`` is significantly above / below ``other``."""
    signs = [one.sign(label, other) for one in found]
    return NONE if label == other else f"{signs.count(1)} / {signs.count(-1)}"


def agreement(found: Sequence[Setting]) -> list[str]:
    """Return how far the validation loss and the test figure agree, for each setting."""
    rows: list[list[str]] = []
    for one in found:
        values = one.agreement()
        low_high = f"{min(values):.2f} to {max(values):.2f}" if values else NONE
        picks = f"{one.picks()} of {len(one.records)}"
        rows.append([one.title, f"{fmean(values):.2f}" if values else NONE, low_high, picks])
    text = (
        "Does the validation loss, which most strategies learn from, predict the test figure? Spearman's correlation "
        "of the two (with signs such that 1 is agreement) over single candidates and random subsets, and the number of "
        "seeds in which the strategy with the lowest validation loss had the highest test figure."
    )
    head = ["setting", "Spearman, mean", "over seeds", "lowest loss is best"]
    return ["## Where validation loss and test figure disagree", text, table(head, rows)]
