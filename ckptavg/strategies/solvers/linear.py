"""Fit coefficients of any sum to the kept outputs of a linear model, by Newton's method on a ridge-penalised loss.

Shape suffixes: N = candidates, U = units (examples, or batches if the loss has one value for each).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import NotFiniteError, TaskError
from ckptavg.objective import Learned, Losses, Objective, SelectBy
from ckptavg.objective.output_losses import Expansion, OutputLosses
from ckptavg.score import Split

RIDGES: Final = tuple(10 ** (-4 + 8 * k / 9) for k in range(10))
"""Strengths λ of the penalty to choose from, ascending."""
FOLDS: Final = 5
ONLY: Final = 1e-4  # the strength where there is a single unit, so that none can be held out
STEPS: Final = 100  # of Newton's method
HALVINGS: Final = 40  # of a step that does not lower the objective
DECREASE: Final = 1e-4  # fraction of the predicted decrease that a step must bring
FITTING: Final = "fitting the coefficients"
_FLAT: Final = 1e-12  # fraction of the largest curvature below which a direction has none


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A minimum of the penalised loss.

    Attributes:
        c_N: [N], the coefficients.
        losses_U: [U], the loss of each unit there.
        converged: whether the last step was within rounding of the minimum.
    """

    c_N: Tensor
    losses_U: Tensor
    converged: bool


class HeldOut(NamedTuple):
    """Held-out means of a strength, each unit at the fit without its fold; the metric is NaN if there is none."""

    ridge: float
    loss: float
    metric: float


def minimised(outputs: OutputLosses, weight_U: Tensor, ridge: float, start_N: Tensor) -> Fit:
    """Return argmin over c of Σ_u v_u ℓ_u(c)/Σ_u v_u + (λ/2)·‖c‖², from ``start_N``.

    Steps are −H⁻¹g with H's eigenvalues by magnitude, 0 along directions without curvature, halved until the value
    falls by `DECREASE` of what is predicted. The last one is below √eps of the largest coefficient, and its error is
    the square of that for smooth losses.

    Args:
        weight_U: [U], the weights v ≥ 0.
        ridge: λ ≥ 0.
    Raises:
        NotFiniteError: if the loss at ``start_N`` is NaN or infinite.
    """
    c_N, here = start_N, outputs.expand(start_N, weight_U)
    value = _value(here, weight_U, ridge, c_N)
    if not math.isfinite(value):
        raise NotFiniteError(f"the loss is {value} at a combination of the candidates' outputs")
    tolerance = math.sqrt(outputs.eps)
    for _ in range(STEPS):
        gradient_N = here.gradient_N + ridge * c_N
        step_N = _newton(gradient_N, here.hessian_NN + ridge * torch.eye(len(c_N), dtype=c_N.dtype))
        if not step_N.isfinite().all():
            break
        rounding = 4 * outputs.eps * abs(value)
        if -float(step_N @ gradient_N) <= rounding:  # a line search would compare rounding errors
            c_N = c_N + step_N
            return Fit(c_N=c_N, losses_U=outputs.expand(c_N, weight_U).losses_U, converged=True)
        close = float(step_N.abs().max()) <= tolerance * max(1.0, float(c_N.abs().max()))
        for _ in range(HALVINGS):
            there_N = c_N + step_N
            there = outputs.expand(there_N, weight_U)
            reached = _value(there, weight_U, ridge, there_N)
            if reached <= value + DECREASE * float(step_N @ gradient_N) + rounding:
                break
            step_N = step_N / 2
        else:
            break
        c_N, here, value = there_N, there, reached
        if close:
            return Fit(c_N=c_N, losses_U=here.losses_U, converged=True)
    return Fit(c_N=c_N, losses_U=here.losses_U, converged=False)


def _value(at: Expansion, weight_U: Tensor, ridge: float, c_N: Tensor) -> float:
    return float(weight_U @ at.losses_U / weight_U.sum() + ridge / 2 * (c_N @ c_N))


def _newton(gradient_N: Tensor, hessian_NN: Tensor) -> Tensor:
    if not (hessian_NN.isfinite().all() and gradient_N.isfinite().all()):
        return torch.full_like(gradient_N, math.nan)
    values_N, vectors_NN = torch.linalg.eigh(hessian_NN)
    size_N = values_N.abs()
    inverse_N = torch.where(size_N > _FLAT * size_N.max(), 1 / size_N, 0.0)
    return -vectors_NN @ (inverse_N * (vectors_NN.T @ gradient_N))


def fit(objective: Objective, losses: Losses, *, on: Split | None, ridge: float | None, select_by: SelectBy) -> Learned:
    """Return the coefficients of the minimum of the mean loss + (λ/2)·‖β‖² over all β.

    In scikit-learn's terms C = 1/(λ·number of examples). The units are dealt to `FOLDS` folds at random. For each λ of
    `RIDGES` and each fold the minimum without the fold is found, and the λ with the best mean of the deciding metric
    over the held-out units (ties: the lowest loss) is used on all of them; ``select_by`` may be the loss, which also
    decides if the task has no metric of each unit.

    Args:
        ridge: λ; None chooses it.
    References:
        Izbicki and Shelton 2019, Distributed Learning of Non-Convex Linear Models with One Round of Communication,
        ECML-PKDD 2019.
    """
    outputs, notes, tables = losses.outputs(on), list[str](), dict[str, list[dict[str, float | str | None]]]()
    held_out: float | None = None
    start_N = torch.zeros(objective.n, dtype=torch.float64)
    if not outputs.expand(start_N, outputs.examples_U).hessian_NN.any():
        message = "--constraint linear needs a curved loss, but this one has no second derivatives at 0"
        raise TaskError(message, hint="choose --constraint affine, or --force-linear")
    if ridge is None and len(outputs.examples_U) == 1:
        ridge = ONLY
        notes.append(f"no cross-validation, because the loss has one value in all: --ridge {ONLY:g} was used")
    if ridge is None:
        held = _held_out(objective, outputs)
        by_metric = select_by != "loss" and not any(math.isnan(one.metric) for one in held)
        best = max(held, key=lambda one: (one.metric if by_metric else 0.0, -one.loss))
        ridge, figure = best.ridge, "score" if by_metric else "loss"
        notes.append(f"ridge {ridge:.3g} has the best held-out {figure} of {len(held)} over {FOLDS} folds")
        tables = {"ridge, by held-out data": _table(held, with_metric=by_metric)}
        held_out = best.loss if (on or objective.scored_on) == objective.scored_on else None
    found = minimised(outputs, outputs.examples_U, ridge, start_N)
    objective.progress(FITTING, 1 + FOLDS, 1 + FOLDS)
    if not found.c_N.any():
        raise TaskError("all coefficients are 0: the loss does not depend on the candidates' outputs")
    row = tuple(found.c_N.tolist())
    notes.append(f"the coefficients sum to {math.fsum(row):.4g}: a linear model may have any sum")
    if not found.converged:
        notes.append("the fit did not settle: the loss is not smooth, or falls without end (try a larger --ridge)")
    return Learned(
        coefficients=Coefficients((row,), linear=True), notes=notes, tables=tables, held_out=held_out
    )  # fmt: skip


def _held_out(objective: Objective, outputs: OutputLosses) -> list[HeldOut]:
    """Return the held-out figures of each strength, the largest first."""
    examples_U = outputs.examples_U
    folds = min(FOLDS, len(examples_U))
    fold_U = torch.randperm(len(examples_U), generator=objective.generator) % folds
    figures = dict.fromkeys(reversed(RIDGES), (0.0, 0.0))
    for fold in range(folds):
        objective.progress(FITTING, fold, 1 + folds)
        c_N, out_U = torch.zeros(objective.n, dtype=torch.float64), fold_U == fold
        for ridge, (loss, metric) in figures.items():
            found = minimised(outputs, examples_U * ~out_U, ridge, c_N)
            c_N, metric_U = found.c_N, outputs.metric(found.c_N)
            loss += float(examples_U[out_U] @ found.losses_U[out_U])
            metric += math.nan if metric_U is None else float(examples_U[out_U] @ metric_U[out_U])
            figures[ridge] = loss, metric
    total = float(examples_U.sum())  # of counts of right answers, so that equal ones are ties to the last bit
    return [HeldOut(ridge, loss / total, metric / total) for ridge, (loss, metric) in figures.items()]


def _table(held: Sequence[HeldOut], *, with_metric: bool) -> list[dict[str, float | str | None]]:
    names = HeldOut._fields if with_metric else HeldOut._fields[:2]
    titles = {"ridge": "ridge", "loss": "held-out loss", "metric": "held-out score"}
    return [{titles[name]: getattr(one, name) for name in names} for one in held]
