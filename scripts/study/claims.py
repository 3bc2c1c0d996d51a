"""Claims of the papers, on the trainings of the study."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Final

from study.cell import PICK
from study.interval import Interval
from study.setting import Setting, constant
from study.tables import NONE, digits_of, shown, table

AVERAGES: Final = ("SWA", "WSM sqrt", "TWA cross-validated", PICK)
"""Averages of a training without decay that are compared with one that decays."""


def claims(found: Sequence[Setting]) -> list[str]:
    """Return the sections, one per claim."""
    return [
        "## The papers' claims",
        *_decay(found),
        *_sewa(found),
        *_aswa(found),
        *_peers(found),
        *_twa(found),
        *_owa(found),
    ]


def _decay(found: Sequence[Setting]) -> list[str]:
    """Compare averages of a training at a constant rate with the last checkpoint of one that decays."""
    rows: list[list[str]] = []
    labels = ["last", *AVERAGES]
    for one in found:
        if (plain := constant(one, found)) is not None:
            differences = [plain.difference_to(label, one) for label in labels]
            rows.append([f"{one.name}: {one.schedule}", *(shown(each, digits_of(one)) for each in differences)])
    text = (
        "Merging instead of decaying (Tian et al., 2025, WSM): a training at a constant learning rate, averaged, "
        "against the last checkpoint of a training with as many steps whose rate decays. Test figure of the former "
        "minus that of the latter, paired by seed; above zero the decay was not needed."
    )
    return ["### A constant rate and an average, or a decay?", text, table(["decay", *labels], rows)] if rows else []


def _peers(found: Sequence[Setting]) -> list[str]:
    rivals = ("SWA", "ASWA", PICK)
    rows: list[list[str]] = []
    for one in found:
        for peer in one.peers:
            digits = digits_of(one)
            differences = [shown(one.difference(label, peer), digits) for label in rivals]
            figure = one.domain.scale * fmean(row.figure for row in one.rows(peer))
            rows.append([f"{one.title}: {peer}", f"{figure:.{digits}f}", *differences])
    text = (
        "Test figure of what another tool made of the same training (dicee's SWA: of a training of its own, because "
        "it changes the learning rate), and that of ckptavg's strategies minus it."
    )
    head = ["setting and tool", "figure", *rivals]
    return ["### The papers' own code", text, table(head, rows)] if rows else []


def _sewa(found: Sequence[Setting]) -> list[str]:
    swept = [one for one in found if one.ks]
    text = (
        "Wang et al. (2025) compare values of K up to all candidates; to their reviewers the curves of SeWA and LAWA "
        "looked alike. Test figure by K, and the mean of SeWA − LAWA over all K < N, paired by seed. At K = N both are "
        "SWA; LAWA at K = 1 is the last checkpoint. Where SeWA returns another average as it is better, the figure "
        "is that average's."
    )
    parts = ["### SeWA for every K", text]
    for ks in dict.fromkeys(tuple(one.ks) for one in swept):
        mine = [one for one in swept if tuple(one.ks) == ks]
        parts.append(table(["setting", *map(str, ks), "SeWA − LAWA"], [row for one in mine for row in _by_k(one)]))
    return [*parts, _same(found), *_ranks(found)] if swept else []


def _by_k(one: Setting) -> list[list[str]]:
    digits = digits_of(one)
    rows: list[list[str]] = []
    for kind in ("SeWA", "LAWA"):
        figures = [one.swept(kind, k) for k in one.ks]
        rows.append([f"{one.title}: {kind}", *(f"{fmean(f):.{digits}f}" if f else NONE for f in figures), ""])
    rows[0][-1] = shown(_over_ks(one), digits)
    return rows


def _same(found: Sequence[Setting]) -> str:
    """Count how often each SeWA chose the subset that LAWA takes without scoring."""
    records = [record for one in found for record in one.records]
    labels = [label for label in dict.fromkeys(label for one in found for label in one.labels) if "SeWA" in label]
    counts: list[str] = []
    for label in labels:
        pairs = [(record.row(label), record.row("LAWA")) for record in records]
        known = [(a.chosen, b.chosen) for a, b in pairs if a is not None and b is not None]
        counts.append(f"{label} {sum(a is not None and a == b for a, b in known)} of {len(known)}")
    return f"Trainings in which a strategy chose exactly LAWA's subset: {', '.join(counts)}."


def _ranks(found: Sequence[Setting]) -> list[str]:
    """Count how often each SeWA chose the best of all subsets by validation loss, and at what cost."""
    records = [record for one in found for record in one.records]
    labels = [label for label in dict.fromkeys(label for one in found for label in one.labels) if "SeWA" in label]
    rows: list[list[str]] = []
    for label in labels:
        known = [(row, record) for record in records if (row := record.row(label)) and row.rank is not None]
        if not known:
            continue
        ratios = [
            row.epochs / sewa.epochs
            for row, record in known
            if (sewa := record.row("SeWA")) and row.epochs is not None and sewa.epochs
        ]
        best = sum(row.rank == 1 for row, _ in known)
        near = sum((row.rank or 0) <= max(1, 0.01 * record.subsets) for row, record in known)
        price = f"{median(ratios):.2f}" if ratios else NONE
        excess = [
            row.val_loss / top.val_loss - 1 for row, record in known if (top := record.row("best subset")) is not None
        ]
        within = f"{sum(each <= 0.01 for each in excess)} of {len(excess)}" if excess else NONE
        worst = f"{max(excess):+.1%}" if excess else NONE
        rows.append([label, f"{best} of {len(known)}", f"{near} of {len(known)}", within, worst, price])
    if not rows:
        return []
    text = (
        "How often the chosen subset was the best, or within the best 1 %, of all subsets of size K by validation "
        "loss; in how many trainings its validation loss is at most 1 % above that of the best, and the largest "
        "excess; and the cost of the search in training epochs relative to SeWA's on the same training (median). "
        "Trainings in which SeWA returned another average, because it was better, are left out."
    )
    return [
        text,
        table(["strategy", "best", "best 1 %", "loss within 1 %", "largest excess", "cost relative to SeWA"], rows),
    ]


def _over_ks(one: Setting) -> Interval | None:
    inner = [k for k in one.ks if k < one.records[0].n]  # at N both are the same
    pairs = [(one.swept("SeWA", k), one.swept("LAWA", k)) for k in inner]
    if not pairs:
        return None
    seeds = range(len(one.records))
    return Interval.of([fmean(sewa[seed] - lawa[seed] for sewa, lawa in pairs) for seed in seeds])


def _aswa(found: Sequence[Setting]) -> list[str]:
    rows: list[list[str]] = []
    for one in found:
        digits = digits_of(one)
        row = [one.title]
        for label in ("ASWA", "ASWA, no hard updates"):
            pairs = list(zip(one.rows(label), one.rows("SWA"), strict=False))
            atleast = sum(a.figure >= s.figure for a, s in pairs)
            row += [shown(one.difference(label, "SWA"), digits), f"{atleast} of {len(pairs)}" if pairs else NONE]
        rows.append(row)
    text = (
        "Demir et al. (2024): ASWA is never worse than SWA. The rule guarantees this only for the order of acceptance "
        "on validation data; this is the test figure. (Their public code does not restore a rejected average; this is "
        "the rule as described in the paper.)"
    )
    head = ["setting", "ASWA − SWA", "ASWA ≥ SWA", "no hard updates − SWA", "≥ SWA"]
    return ["### ASWA is at least SWA", text, table(head, rows)]


def _twa(found: Sequence[Setting]) -> list[str]:
    found = [one for one in found if one.records[0].early]
    labels = list(dict.fromkeys(row.label for one in found for r in one.records for row in r.early))
    rows = [[one.title, *(shown(one.early(label), digits_of(one)) for label in labels)] for one in found]
    share = "; ".join(dict.fromkeys(f"{r.n} candidates" for one in found for r in one.records))
    text = (
        "Li et al. (2023): TWA on the checkpoints of the first 60 % of a training reaches the accuracy of the whole "
        f"training. Test figure of each strategy on the first 60 % ({share}) minus that of the last checkpoint of the "
        "whole training."
    )
    return ["### The whole training from its first 60 %", text, table(["setting", *labels], rows)] if rows else []


def _owa(found: Sequence[Setting]) -> list[str]:
    """Compare OWA with the plain mean and the fit to all data."""
    found, rows = [one for one in found if one.rows("OWA")], list[list[str]]()
    for one in found:
        digits = digits_of(one)
        labels = ["SWA", "OWA", *one.peers]
        figures = [one.domain.scale * fmean(row.figure for row in one.rows(label)) for label in labels]
        losses = [fmean(row.test_loss for row in one.rows(label)) for label in labels]
        sizes = [fmean(row.also["nonzeros"] for row in one.rows(label)) for label in labels]
        cells = [f"{a:.{digits}f}, {b:.3f} ({c:,.0f})" for a, b, c in zip(figures, losses, sizes, strict=True)]
        rows.append([one.title, *cells, shown(one.difference("OWA", "SWA"), digits)])
    text = (
        "Izbicki and Shelton (2019): one round of communication is enough for linear models of p shards, if their "
        "coefficients are fitted to a small sample instead of being 1/p (the plain mean, SWA). Test figure, test loss "
        "and, in brackets, the nonzero weights."
    )
    head = ["setting", "SWA", "OWA", *dict.fromkeys(peer for one in found for peer in one.peers), "OWA − SWA"]
    return ["### Fitted coefficients of linear models", text, table(head, rows)] if rows else []
