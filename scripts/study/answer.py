"""The answer to the study's question, in a few sentences made from its figures."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Final

from study.cell import PICK
from study.interval import Interval
from study.setting import Setting, constant
from study.tables import places, tally

RATES: Final = {"the learning rate is constant": ("constant",), "it decays": ("cosine", "wsd")}
NOTHING: Final = Interval(mean=0.0, half=None, count=0)


def answer(found: Sequence[Setting]) -> list[str]:
    """Return a list of the findings: the best, whether averaging helps at all, whether to let compare choose."""
    if not found:
        return []
    mean = {label: fmean(each.values()) for label, each in places(found).items()}
    order = sorted(mean, key=mean.__getitem__)
    trainings = sum(len(one.records) for one in found)
    best = "; ".join(f"**{label}** {mean[label]:.1f}" for label in order[:3])
    points = [
        f"Of {len(order)} strategies on {trainings} trainings ({len(found)} settings), the best mean places by a test "
        f"figure that decided nothing: {best}; SWA has {mean['SWA']:.1f}, the last checkpoint {mean['last']:.1f}.",
        f"{order[0]} is {_against(found, order[0], 'SWA')}, and {_against(found, order[0], 'last')}.",
        f"Plain averaging (SWA) is {_kinds(found)}.",
    ]
    if any(one.rows(PICK) for one in found):
        changes = [change for one in found for change in one.loss_changes(PICK)]
        points.append(
            f"What `ckptavg compare` picks by validation is {_against(found, PICK, 'SWA')}, and "
            f"{_against(found, PICK, 'last')}; its test loss is {median(changes):+.1%} against SWA (median)."
        )
    peers = [
        _against([one for one in found if peer in one.peers], PICK, peer)
        for peer in dict.fromkeys(peer for one in found for peer in one.peers)
    ]
    if peers:
        points.append(f"Against averages and fits of other tools, that pick is {'; '.join(peers)}.")
    if decays := [(one, plain) for one in found if (plain := constant(one, found)) is not None]:
        signs = [(plain.difference_to(PICK, one) or NOTHING).sign for one, plain in decays]
        points.append(
            "A constant learning rate, and the pick of its checkpoints, ends significantly above the last checkpoint "
            f"of a training that decays in {signs.count(1)} and below it in {signs.count(-1)} of {len(signs)} settings."
        )
    return ["\n".join(f"- {point}" for point in points)]


def _against(found: Sequence[Setting], label: str, other: str) -> str:
    above, below = tally(found, label, other)
    return f"significantly above {other} in {above} and below it in {below} of {len(found)} settings"


def _kinds(found: Sequence[Setting]) -> str:
    texts: list[str] = []
    for name, schedules in RATES.items():
        mine = [one for one in found if one.schedule in schedules]
        if mine:
            above, below = tally(mine, "SWA", "last")
            texts.append(f"above the last checkpoint in {above} and below it in {below} of {len(mine)} where {name}")
    return "; ".join(texts)
