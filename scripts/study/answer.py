"""The answer to the study's question, in a few sentences made from its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Final

from study.cell import PICK
from study.interval import FEWEST
from study.setting import Setting, constant
from study.tables import places

RATES: Final = {"at a constant learning rate": ("constant",), "where it decays": ("cosine", "wsd")}


def answer(found: Sequence[Setting]) -> list[str]:
    """Return a list of the findings: the best, whether averaging helps at all, whether to let compare choose."""
    if not found:
        return []
    mean = {label: fmean(each.values()) for label, each in places(found).items()}
    order = sorted(mean, key=mean.__getitem__)
    last = f", the last checkpoint {mean['last']:.1f}" if "last" in mean else ""  # not where there is no order
    trainings = sum(len(one.records) for one in found)
    best = "; ".join(f"**{label}** {mean[label]:.1f}" for label in order[:5])
    points = [
        f"Of {len(order)} strategies on {trainings} trainings ({len(found)} settings), the best mean places by test "
        f"figure: {best}; SWA has {mean['SWA']:.1f}{last}. Close places are not told apart.",
        f"{order[0]} against SWA: {_counts(found, order[0], 'SWA')}. Here and below, settings in which the difference "
        "is significantly above / below zero, of how many.",
        *(
            f"Plain averaging (SWA) against the last checkpoint, {name}: {_counts(mine, 'SWA', 'last')}."
            for name, schedules in RATES.items()
            if (mine := [one for one in found if one.schedule in schedules])
        ),
    ]
    if any(one.rows(PICK) for one in found):
        points += [
            f"What `ckptavg compare` picks by validation, against {what}: {_counts(found, PICK, other)}."
            for what, other in (("SWA", "SWA"), ("the best single checkpoint by validation", "best"))
        ]
    for peer in dict.fromkeys(peer for one in found for peer in one.peers):
        mine = [one for one in found if peer in one.peers]
        points.append(f"That pick against {peer}: {_counts(mine, PICK, peer)}.")
    decays = [one for one in found if constant(one, found) is not None]
    if decays:
        points.append(
            "That pick of a training at a constant rate, against the last checkpoint of one that decays: "
            f"{_by_area(decays, lambda one: _merged(one, found))}."
        )
    return ["\n".join(f"- {point}" for point in points)]


def _counts(found: Sequence[Setting], label: str, other: str) -> str:
    return _by_area(found, lambda one: one.sign(label, other))


def _merged(one: Setting, found: Sequence[Setting]) -> int | None:
    plain = constant(one, found)
    difference = None if plain is None else plain.difference_to(PICK, one)
    return None if difference is None or difference.count < FEWEST else difference.sign


def _by_area(found: Sequence[Setting], sign: Callable[[Setting], int | None]) -> str:
    texts: list[str] = []
    for area in dict.fromkeys(one.domain.area for one in found):
        signs = [known for one in found if one.domain.area == area and (known := sign(one)) is not None]
        if signs:
            texts.append(f"{area.lower() or 'toys'} {signs.count(1)} / {signs.count(-1)} of {len(signs)}")
    return ", ".join(texts) or "too few seeds"
