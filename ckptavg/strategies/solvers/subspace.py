"""Optimise mixtures in the subspace that the candidates span: by training, or on a quadratic model of the loss.

Shape suffixes: G = groups of tensors (blocks), N = candidates.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.errors import UsageError, counted
from ckptavg.objective import SCORED_ALONE, Learned, Losses, Objective, SelectBy, check_losses
from ckptavg.objective.selection import Selection
from ckptavg.score import Score, Split

Constraint: TypeAlias = Literal["affine", "simplex", "linear"]
RATE: Final = {"val": 0.24, "train": 0.0024}  # times the mean distance, divided by the number of candidates
EPOCHS: Final = 10
FLOOR: Final = 200  # steps at least, by default
FEW: Final = 100  # steps below which the report says so
SCORED: Final = 10  # points of a training that are scored
TRAINING: Final = "training the coefficients"


@dataclass(frozen=True)
class Subspace:
    """The coordinates x of mixtures around the mean, in which the mean is 0.

    Attributes:
        distance_GN: [..., N], ‖w_i − w̄‖; where 0, p_i is 0 and x_i has no effect.
        constraint: the set of coefficients: of sum 1, none of them negative too, or of any sum.
        groups: the tensors that each row applies to.
    """

    distance_GN: Tensor
    constraint: Constraint
    groups: Groups = EVERYTHING

    def coefficients(self, x_GN: Tensor) -> Tensor:
        """Return β from x: 1/N + x_i/‖w_i − w̄‖ − (1/N)·Σ_j x_j/‖w_j − w̄‖, or softmax(N·x_i/‖w_i − w̄‖).

        Both are [..., N]; each row of β sums to 1 to rounding and is differentiable in x. The linear form is the first
        without its last term.
        """
        n, distance_GN = x_GN.shape[-1], self.distance_GN
        inverse_GN = torch.where(distance_GN > 0, 1 / distance_GN, torch.zeros_like(distance_GN))
        y_GN = x_GN * inverse_GN
        if self.constraint == "simplex":
            return torch.softmax(n * y_GN, dim=-1)
        return 1 / n + y_GN - (0 if self.constraint == "linear" else y_GN.mean(dim=-1, keepdim=True))

    def mixture(self, x_GN: Tensor) -> Coefficients:
        """Return the coefficients at x, [G, N].

        Raises:
            UsageError: if they are not finite, or so large that they do not sum to 1.
        """
        # on the CPU, because rows cannot sum to 1 on a device without float64
        host = Subspace(self.distance_GN.to("cpu", torch.float64), self.constraint)
        beta, free = host.coefficients(x_GN.detach().to("cpu", torch.float64)), self.constraint == "linear"
        off = 0.0 if free else float((beta.sum(dim=-1) - 1).abs().max())
        if not bool(torch.isfinite(beta).all()) or off > beta.shape[-1] * 2**-40:
            raise UsageError("the coefficients diverged", hint="choose a smaller --lr, or --clip")
        return Coefficients(tuple(map(tuple, beta.tolist())), self.groups, linear=free)


def train(
    objective: Objective, losses: Losses, *, on: Split | None, groups: Groups, constraint: Constraint,
    epochs: int | None, lr: float | None, optimizer: Literal["adamw", "sgd"], weight_decay: float,
    clip: float | None, sam_rho: float, patience: int | None, select_by: SelectBy,
) -> Learned:  # fmt: skip
    """Train the coordinates from the mean; the settings are those of `ckptavg.strategies.twa.TWA`.

    A loss that is not finite is a TaskError, and coefficients that diverge are a UsageError.
    """
    fit: Split = on or objective.scored_on
    monitored: Split = objective.scored_on
    if patience is not None and fit == monitored:
        fit, monitored = "fit", "held"  # these share no examples
    distance_GN = losses.distances(groups)
    if lr is None:
        mean_G1 = distance_GN.mean(dim=1, keepdim=True)
        distance_GN = torch.where(mean_G1 > 0, distance_GN / mean_G1, distance_GN)
    subspace = Subspace(distance_GN, constraint, groups)
    x_GN = torch.zeros_like(distance_GN, requires_grad=True)
    per_epoch = losses.batches(fit)
    epochs = epochs or default_epochs(per_epoch)
    rate = lr or RATE[on or objective.scored_on] / objective.n
    descent = (
        torch.optim.AdamW([x_GN], lr=rate, weight_decay=weight_decay)
        if optimizer == "adamw"
        else torch.optim.SGD([x_GN], lr=rate, momentum=0.9, weight_decay=weight_decay)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(descent, lambda step: _warm_up_and_cosine(step, epochs * per_epoch))
    steps: list[Tensor] = []
    trace: list[float] = []
    points = _HeldOut(objective, monitored, patience) if patience else _Scored(objective, epochs, select_by)
    points.add(0, subspace.mixture(x_GN))
    for epoch in range(epochs):
        for _ in range(per_epoch):
            steps.append(_backward(losses, subspace, x_GN, fit, sam_rho))
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([x_GN], clip)
            descent.step()
            schedule.step()
            figures = {"epoch": epoch + 1, "loss": steps[-1]}
            objective.progress(TRAINING, len(steps), epochs * per_epoch, **figures)
        trace += torch.stack(steps[len(trace) :]).tolist()
        check_losses(trace[-per_epoch:], per_epoch, fit, first=len(trace) - per_epoch)
        if points.add(epoch + 1, subspace.mixture(x_GN)):
            break
    few = f"only {counted(len(trace), 'step')} to train the coefficients: more --epochs or smaller batches give more"
    best, notes = points.best()
    curves = {"loss": trace, "scored_step": [epoch * per_epoch for epoch in points.losses]}
    curves["scored_loss"] = list(points.losses.values())
    return Learned(coefficients=best, trace=curves, notes=[*notes, few] if len(trace) < FEW else notes)


def default_epochs(per_epoch: int) -> int:
    """Return the passes over data of so many batches: `EPOCHS`, or as many as give `FLOOR` steps."""
    return max(EPOCHS, math.ceil(FLOOR / per_epoch))


class _HeldOut:
    """The points of epochs by held-out score: stop ``patience`` epochs after the best, which is the result."""

    def __init__(self, objective: Objective, split: Split, patience: int) -> None:
        self._objective, self._patience = objective, patience
        self._split: Split = split
        self._points: list[Coefficients] = []
        self._scores: list[float] = []
        self.losses: dict[int, float] = {}  # by epoch

    def add(self, epoch: int, point: Coefficients) -> bool:
        """Score the point of an epoch; return whether to stop."""
        score = self._objective.score(point, self._split)
        self._points.append(point)
        self._scores.append(score.value)
        _add_loss(self.losses, epoch, score)
        return epoch - self._scores.index(max(self._scores)) >= self._patience

    def best(self) -> tuple[Coefficients, list[str]]:
        """Return the first point with the best score, and notes."""
        return self._points[self._scores.index(max(self._scores))], []


class _Scored:
    """The points of `SCORED` epochs, of which the best by score is the result, unless a plain average is better."""

    def __init__(self, objective: Objective, epochs: int, select_by: SelectBy) -> None:
        self.losses: dict[int, float] = {}  # by epoch
        self._selection = Selection(objective, select_by)
        self._objective = objective
        self._epochs = {math.ceil(i * epochs / SCORED) for i in range(SCORED + 1)}

    def add(self, epoch: int, point: Coefficients) -> bool:
        """Score the point of an epoch, if it is one of those to score."""
        if epoch in self._epochs:
            # the mean of all, not a point that equals it but for rounding
            scored = point if epoch else self._selection.plain[-1]
            self._selection.score([scored])
            _add_loss(self.losses, epoch, self._selection.scores[scored])
        return False

    def best(self) -> tuple[Coefficients, list[str]]:
        """Score the single candidates; return the best of all, and notes."""
        selection = self._selection
        selection.score(selection.plain[:-1], SCORED_ALONE.name, self._objective.n)
        best = selection.best()
        notes = [note] if (note := selection.note(best)) else []
        if best in selection.plain and best.n > 1:
            kind = "the mean of all candidates" if best == selection.plain[-1] else "the best single candidate"
            notes.append(f"the answer is {kind}, not a step of the training")
        return best, notes


def _add_loss(losses: dict[int, float], epoch: int, score: Score) -> None:
    if score.loss is not None and not score.invalid:
        losses[epoch] = score.loss


def _warm_up_and_cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear over a fifth of the steps, then a cosine to 0."""
    warmup = steps // 5
    return (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def _backward(losses: Losses, subspace: Subspace, x_GN: Tensor, fit: Split, sam_rho: float) -> Tensor:
    """Set x.grad to the gradient of the loss, or SAM loss, of the next batch; return the loss at x."""

    def backward(*, again: bool) -> Tensor:
        x_GN.grad = None
        c_GN = subspace.coefficients(x_GN)
        groups = subspace.groups
        loss = losses.loss(c_GN if len(groups) > 1 else c_GN[0], fit, groups=groups, again=again)
        loss.backward()
        return loss.detach()

    loss = backward(again=False)
    if sam_rho:
        assert x_GN.grad is not None
        shift_GN = sam_rho * x_GN.grad / x_GN.grad.norm().clamp(min=torch.finfo(x_GN.dtype).tiny)
        with torch.no_grad():
            x_GN += shift_GN
        backward(again=True)
        with torch.no_grad():
            x_GN -= shift_GN
    return loss
