"""Choose a subset on a quadratic model of the loss, recentered at every subset whose real loss is the lowest so far."""

from collections.abc import Collection
from typing import Literal

import torch

from ckptavg.coefficients import Coefficients
from ckptavg.objective import Hessian, Learned, Losses, Objective
from ckptavg.score import Score, Split
from ckptavg.surrogate.subsets import best_subsets

MOVES = 5  # times the quadratic is moved to the best subset so far


def descend(
    objective: Objective, losses: Losses, k: int | Literal["auto"], *, on: Split | None, hessian: Hessian, verify: int
) -> Learned:
    """Return the best of ``verify`` subsets by real loss, each chosen as the best on the quadratic when scored.

    See `ckptavg.surrogate`. If k is "auto", the best subset of every size is scored first, and all others have the size
    that won; subsets are scored by loss, which is what the quadratic predicts. Whenever a subset is better than all
    before it, the quadratic is recentered there: value and gradient of the real loss at the subset, with the second
    derivatives kept, at the cost of a forward and a backward pass. Without recentering, the best subset of a network in
    a wide valley may rank only hundredth on the quadratic around the mean.
    """
    n, q = objective.n, losses.folds(on, hessian, 1).mean()
    best_of = {size: best_subsets(q, size, 1) for size in range(1, n + 1)}
    scores: dict[tuple[int, ...], Score] = {}
    total = verify + n - 1 if k == "auto" else verify
    if k == "auto":
        first = {size: subsets.masks[0] for size, subsets in best_of.items()}
        objective.prefetch([Coefficients.uniform(mask, n) for mask in first.values()])
        lowest(objective, first.values(), scores, total)
        k = min(first, key=lambda size: (scores[first[size]].loss or 0.0, -size))
    near, tried, moves = best_of[k].masks, list[tuple[int, ...]](), 0
    chosen = None
    while len(tried) < verify and (fresh := [mask for mask in near if mask not in tried]):
        tried.append(fresh[0])
        better = lowest(objective, tried, scores, total)
        if better != chosen and moves < MOVES and len(tried) < verify:
            mixture, moves = Coefficients.uniform(better, n), moves + 1
            q = q.recentered(torch.tensor(mixture.values[0], dtype=torch.float64), *losses.gradient(mixture, on))
            near = best_subsets(q, k, verify).masks
        chosen = better
    chosen = lowest(objective, scores, scores, total)  # with "auto", of another size if none of these is better
    notes = [q.note] if q.note else []
    if best_of[k].proof == "heuristic":
        notes.append(f"the best subsets of {k} on the quadratic come from a heuristic, without proof of optimality")
    rows: list[dict[str, float | str | None]] = []
    for size, subsets in best_of.items():
        real = scores.get(subsets.masks[0])
        rows.append({"K": size, "quadratic": subsets.values[0], "loss": real and real.loss})
        if real is not None and real.metric is not None:
            rows[-1][real.name] = real.metric
    best = Coefficients.uniform(chosen, n)
    return Learned(coefficients=best, notes=notes, tables={"best subset of each size": rows})


def lowest(
    objective: Objective, masks: Collection[tuple[int, ...]], scores: dict[tuple[int, ...], Score], total: int
) -> tuple[int, ...]:
    """Return the mask whose uniform average has the lowest loss; ties go to the later candidates.

    Masks without an entry in ``scores`` are scored and entered; ``total`` is the number expected, for the progress bar.
    """
    for mask in masks:
        if mask not in scores:
            scores[mask] = objective.score(Coefficients.uniform(mask, objective.n))
            objective.progress("verifying subsets", len(scores), total, loss=scores[mask].loss or 0.0)
    return min(masks, key=lambda mask: (scores[mask].loss or 0.0, [-i for i in reversed(mask)]))
