"""Fit the coefficients to a quadratic model of the loss, with the shrinkage that has the lowest held-out loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import NotFiniteError
from ckptavg.objective import Hessian, Learned, Losses, Objective, SelectBy
from ckptavg.objective.selection import Selection
from ckptavg.score import Split
from ckptavg.surrogate.cross_validation import FAR, STRENGTHS, Constraint, Fit, shrunk
from ckptavg.surrogate.folds import Folds

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]
MOVES: Final = 12  # gradient passes after that at the mean
EXAMPLES: Final = 256  # for the second derivatives; more change nothing
SETTLED: Final = 1e-3  # fraction by which the held-out loss must fall for another pass
KEPT: Final = 0.25  # fraction of the predicted fall of the loss that must come true
RECENTERING: Final = "recentering the quadratic"
VERIFYING: Final = "verifying the coefficients"


def measured(objective: Objective, losses: Losses, on: Split | None, hessian: Hessian) -> Folds:
    """Return the folds around the mean: second derivatives of `EXAMPLES` examples or 2 per candidate, all gradients."""
    n = objective.n
    mean = Coefficients.uniform(range(n), n)
    q = losses.surrogate(on, hessian, max(EXAMPLES, 2 * n))
    return Folds.at(row(mean), q, *losses.gradients(mean, on))


def row(mixture: Coefficients) -> Tensor:
    """Return the coefficients [N]."""
    return torch.tensor(mixture.values[0], dtype=torch.float64)


def _fits(
    objective: Objective, losses: Losses, folds: Folds, on: Split | None,
    strengths: Mapping[Constraint, Sequence[float]],
) -> tuple[list[Coefficients], float, list[dict[str, float | str | None]]]:  # fmt: skip
    """Return the mean and the fits that were used, the last one's held-out loss less its fitted one, and a table."""
    points = [Coefficients.uniform(range(objective.n), objective.n)]
    rows: list[dict[str, float | str | None]] = []
    real, held_out, optimism, step, tried = folds.q.value, math.inf, 0.0, 1.0, strengths
    for move in range(MOVES):
        objective.progress(RECENTERING, move, MOVES, loss=real)
        fit = shrunk(folds, tried)
        if fit.held_out >= held_out:
            break
        now_N = row(points[-1])
        beta_N = now_N + step * (fit.beta_N - now_N)
        fitted, there = float(folds.q(beta_N)), _measured_at(beta_N, losses, on)
        loss = math.inf if there is None else float(folds.share_F @ there[1][1])
        # where more shrinkage raises the fitted loss, it may rise further by no more than the held-out loss falls
        wrong = real - loss < KEPT * (real - fitted) if fitted < real else loss - fitted > held_out - fit.held_out
        rows.append({
            "constraint": fit.constraint, "shrinkage": fit.strength, "step": step, "held-out": fit.held_out,
            "quadratic": fitted, "loss": None if there is None else loss, "": "not used" if wrong else None,
        })  # fmt: skip
        if wrong or there is None:
            step, tried = step / 2, _stronger(tried, fit) or tried
            continue
        points.append(there[0])
        real, optimism = loss, (1 - step) * optimism + step * max(0.0, fit.held_out - fit.fitted)
        if step == 1 and held_out - fit.held_out < SETTLED * abs(fit.held_out):
            break
        held_out = fit.held_out if step == 1 else held_out
        folds, step, tried = Folds.at(row(there[0]), folds.q, *there[1]), min(1.0, 2 * step), strengths
    objective.progress(RECENTERING, MOVES, MOVES, loss=real)
    return points, optimism, rows


def _stronger(strengths: Mapping[Constraint, Sequence[float]], than: Fit) -> Mapping[Constraint, Sequence[float]]:
    """Return the strengths without those of the fit's constraint that are not above its own."""
    kept: dict[Constraint, Sequence[float]] = {
        kind: [strength for strength in tried if kind != than.constraint or strength > than.strength]
        for kind, tried in strengths.items()
    }
    return {kind: tried for kind, tried in kept.items() if tried}


def _measured_at(beta_N: Tensor, losses: Losses, on: Split | None) -> tuple[Coefficients, Gradients] | None:
    """Return the mixture with the losses and gradients there; None if it is so far away that these are no use."""
    if float(beta_N.abs().max()) > FAR:
        return None
    point = Coefficients((tuple((beta_N / beta_N.sum()).tolist()),))
    try:
        return point, losses.gradients(point, on)
    except NotFiniteError:
        return None


def descend(
    objective: Objective, losses: Losses, *, on: Split | None, hessian: Hessian, constraint: Constraint | None,
    ridge: float | None, select_by: SelectBy,
) -> Learned:  # fmt: skip
    """Return cross-validated coefficients; see `ckptavg.surrogate.cross_validation.shrunk`.

    The quadratic is recentered at each fit: losses and gradients of all folds there, at the cost of a forward and a
    backward pass, with the second derivatives kept; then strength and constraint are chosen again, until the held-out
    loss falls by less than `SETTLED`, with at most `MOVES` such passes. A fit at which the real loss does not fall by
    `KEPT` of what the quadratic predicts is not used: it lies where the quadratic is wrong, and half the way to a fit
    with more shrinkage is tried. Negative eigenvalues of the second derivatives count as 0: a quadratic that falls
    without end would always prefer the least shrinkage.

    The last fit is returned, unless the mean or a single candidate has a lower loss. Where the metric decides and not
    the loss, the best of these and of all fits is; see `ckptavg.objective.selection.Selection`.

    Args:
        constraint: None chooses between the affine plane and the simplex by held-out loss.
        ridge: the strength of the shrinkage; None chooses it by held-out loss.
    """
    folds = measured(objective, losses, on, hessian)
    folds = replace(folds, q=folds.q.convex())
    notes = [folds.q.note] if folds.q.note else []
    if ridge is None and len(folds) == 1:
        ridge = 1.0
        notes.append("no cross-validation, because the loss has one value in all: --ridge 1 was used")
    kinds: tuple[Constraint, ...] = ("affine", "simplex") if constraint is None else (constraint,)
    strengths = dict.fromkeys(kinds, STRENGTHS if ridge is None else (ridge,))
    points, optimism, rows = _fits(objective, losses, folds, on, strengths)
    if len(points) == 1:
        notes.append("no fit has a lower loss than the mean of all candidates")
    selection = Selection(objective, select_by)
    selection.score([*selection.plain, *points], VERIFYING, len(selection.plain) + len(points))
    by_loss = selection.by == "loss"
    chosen = min([points[-1], *selection.plain], key=selection.loss) if by_loss else selection.best()
    notes += [note] if (note := selection.note(None if by_loss else chosen)) else []
    if chosen in selection.plain[:-1] and chosen not in points:
        figures, others = selection.figures(chosen), selection.figures(points[-1])
        notes.append(f"the answer is a single candidate, not a fit: {figures}, the last fit {others}")
    held = ridge is None and chosen == points[-1] and (on or objective.scored_on) == objective.scored_on
    return Learned(
        coefficients=chosen, notes=notes, tables={"shrinkage, by held-out loss": rows},
        held_out=selection.loss(chosen) + optimism if held else None,
    )  # fmt: skip
