"""Choose a subset on a quadratic model of the loss, recentered at every subset whose real loss is the lowest so far."""

import math
from collections.abc import Mapping
from typing import Final, Literal

from ckptavg.coefficients import Coefficients
from ckptavg.errors import NotFiniteError
from ckptavg.objective import Hessian, Learned, Losses, Objective, SelectBy
from ckptavg.objective.selection import Selection
from ckptavg.score import Split
from ckptavg.strategies.solvers.concrete_mask import VERIFYING
from ckptavg.strategies.solvers.cross_validated import SETTLED, measured, row
from ckptavg.surrogate.cross_validation import held_out_of_sizes
from ckptavg.surrogate.folds import Folds
from ckptavg.surrogate.subsets import Mask, best_of_sizes, best_subsets

MOVES: Final = 5  # times the quadratic is moved to the best subset so far
SMALL: Final = 16  # sizes up to this one are all tried; beyond it, each is a tenth larger than the last


def descend(
    objective: Objective, losses: Losses, k: int | Literal["auto"], *, on: Split | None, hessian: Hessian, verify: int,
    select_by: SelectBy,
) -> Learned:  # fmt: skip
    """Return the best of ``verify`` subsets by real score, each chosen as the best on the quadratic when scored.

    If k is "auto", it is the size with the lowest held-out loss on the quadratic, which is recentered at the best
    subset of that size until the held-out loss falls by less than `ckptavg.strategies.solvers.cross_validated.SETTLED`.

    Whenever a subset has a lower loss than all before it, the quadratic is recentered there: losses and gradients of
    the folds, with the second derivatives kept, at the cost of a forward and a backward pass. Without recentering, the
    best subset of a network in a wide valley may rank only hundredth on the quadratic around the mean.

    The single candidates, the mean of all and the mean of the last K are scored too, and returned if they are better.
    The held-out loss is the real loss of the answer plus what choosing a subset of its size gains on the quadratic.
    """
    n, folds = objective.n, measured(objective, losses, on, hessian)
    selection, notes, moves = Selection(objective, select_by), [folds.q.note] if folds.q.note else [], 0
    total = verify + len(selection.plain)
    if k == "auto":
        if len(folds) == 1:
            notes.append("no cross-validation, because the loss has one value in all: K is chosen by the fitted loss")
        folds, masks, held, moves = _sizes_tried(objective, losses, folds, on)
        k = min(held, key=lambda size: held[size])
    else:
        masks = {k: best_subsets(folds.q, k, 1).masks[0]}
        held = held_out_of_sizes(folds, list(masks))
    fitted = {size: float(folds.q(row(Coefficients.uniform(mask, n)))) for size, mask in masks.items()}
    crossed = len(folds) > 1 and (on or objective.scored_on) == objective.scored_on
    near = best_subsets(folds.q, k, verify)
    tried, chosen = list[Mask](), None
    while len(tried) < verify and (fresh := [mask for mask in near.masks if mask not in tried]):
        tried.append(fresh[0])
        selection.score([Coefficients.uniform(fresh[0], n)], VERIFYING, total)
        better = min(tried, key=lambda mask: selection.loss(Coefficients.uniform(mask, n)))
        if better != chosen and moves < 2 * MOVES and len(tried) < verify:
            folds, moves = _recentered(folds, losses, better, on), moves + 1
            near = best_subsets(folds.q, k, verify)
        chosen = better
    selection.score([*selection.plain, Coefficients.uniform(range(n - k, n), n)], VERIFYING, total)
    best = selection.best()
    if near.proof == "heuristic":
        notes.append(f"the best subsets of {k} on the quadratic come from a heuristic, without proof of optimality")
    if len(best.selected) != k:
        plain = "the mean of all candidates" if len(best.selected) == n else "a single candidate"
        notes.append(f"the answer is {plain}, not an average of {k}: {selection.figures(best)}")
    gap = max(0.0, held[k] - fitted[k]) if crossed and len(best.selected) == k else None
    return Learned(
        coefficients=best, held_out=None if gap is None else selection.loss(best) + gap,
        notes=[*notes, *filter(None, [selection.note(best)])],
        tables={"best subset of each size": _rows(masks, fitted, held, selection)},
    )  # fmt: skip


def _sizes_tried(
    objective: Objective, losses: Losses, folds: Folds, on: Split | None
) -> tuple[Folds, Mapping[int, Mask], Mapping[int, float], int]:
    """Return the recentered folds, K → the best subset and its held-out loss, and how often they were recentered."""
    sizes, lowest = _sizes(objective.n), math.inf
    for moves in range(MOVES + 1):
        objective.progress("choosing K", moves, MOVES)
        masks = best_of_sizes(folds.q, sizes)
        held = held_out_of_sizes(folds, list(masks))
        k = min(held, key=lambda size: held[size])
        if moves == MOVES or lowest - held[k] < SETTLED * abs(held[k]):
            return folds, masks, held, moves
        lowest, folds = held[k], _recentered(folds, losses, masks[k], on)
    raise AssertionError


def _sizes(n: int) -> list[int]:
    """Return all sizes up to `SMALL`, and from there each about a tenth larger than the last, up to ``n``."""
    sizes = list(range(1, min(n, SMALL) + 1))
    while sizes[-1] < n:
        sizes.append(min(n, math.ceil(1.1 * sizes[-1])))
    return sizes


def _recentered(folds: Folds, losses: Losses, mask: Mask, on: Split | None) -> Folds:
    """Return the folds around the mean of a mask; as they are if its loss is not finite."""
    mixture = Coefficients.uniform(mask, folds.q.n)
    try:
        return Folds.at(row(mixture), folds.q, *losses.gradients(mixture, on))
    except NotFiniteError:
        return folds


def _rows(
    masks: Mapping[int, Mask], fitted: Mapping[int, float], held_out: Mapping[int, float], selection: Selection
) -> list[dict[str, float | str | None]]:
    rows: list[dict[str, float | str | None]] = []
    for size, mask in masks.items():
        mixture = Coefficients.uniform(mask, next(iter(selection.scores)).n)
        rows.append({"K": size, "quadratic": fitted[size], "held-out": held_out[size]})
        if score := selection.scores.get(mixture):
            rows[-1] |= {"loss": score.loss} | ({} if score.metric is None else {score.name: score.metric})
    return rows
