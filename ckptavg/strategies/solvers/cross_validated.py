"""Fit the coefficients to a quadratic model of the loss, with the shrinkage that has the lowest held-out loss."""

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import NotFiniteError
from ckptavg.objective import Hessian, Learned, Losses, Objective, SelectBy
from ckptavg.objective.selection import Selection
from ckptavg.score import Split
from ckptavg.surrogate.cross_validation import STRENGTHS, Constraint, Fit, shrunk
from ckptavg.surrogate.folds import Folds

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]
MOVES: Final = 8  # gradient passes after that at the mean
EXAMPLES: Final = 256  # for the second derivatives; more change nothing
FAR: Final = 100.0  # coefficients beyond which no loss is near a quadratic
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


def _measured_at(fit: Fit, losses: Losses, on: Split | None) -> tuple[Coefficients, Gradients] | None:
    """Return the mixture of a fit with the losses and gradients there; None if it is so far that these are no use."""
    if float(fit.beta_N.abs().max()) > FAR:
        return None
    point = Coefficients((tuple((fit.beta_N / fit.beta_N.sum()).tolist()),))
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
    loss falls by less than `SETTLED`, at most `MOVES` times. A fit at which the real loss does not fall by `KEPT` of
    what the quadratic predicts is not used: it lies where the quadratic is wrong, and so do fits that are shrunk less.

    The last fit is returned, unless the mean or a single candidate has a lower loss. Where the metric decides and not
    the loss, the best of these and of all fits is; see `ckptavg.objective.selection.Selection`.

    Args:
        constraint: None chooses between the affine plane and the simplex by held-out loss.
        ridge: the strength of the shrinkage; None chooses it by held-out loss.
    """
    folds = measured(objective, losses, on, hessian)
    notes = [folds.q.note] if folds.q.note else []
    if ridge is None and len(folds) == 1:
        ridge = 1.0
        notes.append("no cross-validation, because the loss has one value in all: --ridge 1 was used")
    kinds: tuple[Constraint, ...] = ("affine", "simplex") if constraint is None else (constraint,)
    tried: dict[Constraint, Sequence[float]] = dict.fromkeys(kinds, STRENGTHS if ridge is None else (ridge,))
    points = [Coefficients.uniform(range(objective.n), objective.n)]
    rows: list[dict[str, float | str | None]] = []
    real, held_out, optimism, struck = folds.q.value, math.inf, 0.0, False
    for move in range(MOVES):
        objective.progress(RECENTERING, move, MOVES, loss=real)
        fit = shrunk(folds, tried)
        if fit is None or (struck and fit.fitted >= real):  # all that is left lies behind the last fit
            break
        measured_there = _measured_at(fit, losses, on)
        loss = math.inf if measured_there is None else float(folds.share_F @ measured_there[1][1])
        wrong = loss == math.inf or (fit.fitted < real and real - loss < KEPT * (real - fit.fitted))
        rows.append({
            "constraint": fit.constraint, "shrinkage": fit.strength, "held-out": fit.held_out, "quadratic": fit.fitted,
            "loss": None if loss == math.inf else loss, "": "not used" if wrong else None,
        })  # fmt: skip
        if wrong or measured_there is None:
            tried[fit.constraint] = [strength for strength in tried[fit.constraint] if strength > fit.strength]
            struck = True
            continue
        point, gradients = measured_there
        points.append(point)
        real, optimism, struck = loss, max(0.0, fit.held_out - fit.fitted), False
        if held_out - fit.held_out < SETTLED * abs(fit.held_out):
            break
        held_out, folds = fit.held_out, Folds.at(row(point), folds.q, *gradients)
    objective.progress(RECENTERING, MOVES, MOVES, loss=real)
    if len(points) == 1:
        notes.append("no fit has a lower loss than the mean of all candidates")
    selection = Selection(objective, select_by)
    selection.score([*selection.plain, *points], VERIFYING, len(selection.plain) + len(points))
    by_loss = selection.by == "loss"
    chosen = min([points[-1], *selection.plain], key=selection.loss) if by_loss else selection.best()
    notes += [note] if (note := selection.note()) else []
    held = ridge is None and chosen == points[-1] and (on or objective.scored_on) == objective.scored_on
    return Learned(
        coefficients=chosen, notes=notes, tables={"shrinkage, by held-out loss": rows},
        held_out=selection.loss(chosen) + optimism if held else None,
    )  # fmt: skip
