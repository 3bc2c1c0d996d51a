"""TWA: train the averaging coefficients.

Shape suffixes: G = groups of tensors (blocks), N = candidates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.errors import UsageError
from ckptavg.objective import Hessian, Learned, Objective, Strategy, check_losses, losses_of
from ckptavg.score import Split

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Constraint: TypeAlias = Literal["affine", "simplex"]
RATE: Mapping[Split, float] = {"val": 2e-2, "train": 2e-4}
SEGMENT = 5  # points scored between the mean and the optimum of the quadratic
MOVES = 2  # times the quadratic is moved to the best point so far
FAR = (-1.0, 2.0)  # affine coefficients outside hint at overfitting of a small data set


@dataclass(frozen=True, kw_only=True)
class TWA(Strategy):
    """Train the coefficients by gradient descent in the subspace spanned by the candidates.

    w(x) = w̄ + Σ_i x_i p_i with the mean w̄ and p_i = (w_i − w̄)/‖w_i − w̄‖ (0 if 0/0), starting at x = 0. So
    β_i = 1/N + x_i/‖w_i − w̄‖ − (1/N)·Σ_j x_j/‖w_j − w̄‖, which sums to 1 and may be negative: the authors' affine form.
    The simplex form is β = softmax(N·x_i/‖w_i − w̄‖), the chart of the convex combinations that agrees with the affine
    form to first order at x = 0, so that a learning rate has the same effect in both. Layer-wise, every block of
    tensors has its own x.

    Training uses validation data (TWA-v, the default if available) or training data (TWA-t), AdamW, a linear
    warm-up over a fifth of the steps and a cosine decay to 0. ``--patience`` monitors the score on a held-out half of
    the validation data (all of it for TWA-t) and returns the coefficients of the best epoch, including the initial
    mean; otherwise the last coefficients are returned.

    Differences from the authors' code: unless ``--lr`` is given, x is measured in units of the mean distance
    ‖w_i − w̄‖ (of each block), so that the learning rate does not depend on the scale of the model: 0.02 on validation
    data, and a hundredth of that on training data, where larger steps fit the label noise
    (``scripts/benchmark/rates.py``). Clipping and the SAM step act on the gradient of x instead of that of all D
    parameters, and the SAM gradient replaces the plain one instead of being added to it at a tenth.

    References:
        Li et al. 2023, Trainable Weight Averaging, ICLR 2023 and arXiv:2205.13104v3. SAM: Foret et al. 2021,
        arXiv:2010.01412. The simplex form is the learned soup of Wortsman et al. 2022 (arXiv:2203.05482) in other
        units.
    """

    on: Annotated[
        Literal["val", "train"] | None, "Data to fit the coefficients to; default val if the task has it.",
        "both solvers",
    ] = None  # fmt: skip
    solver: Annotated[Literal["gradient", "quadratic"], "Training or a quadratic model."] = "gradient"
    hessian: Annotated[Hessian, "Second derivatives to use.", "quadratic solver"] = "auto"
    radius: Annotated[float, "Trust region ‖x‖ in mean distances; affine only.", "quadratic solver"] = 1.0
    constraint: Annotated[Constraint, "simplex: no negative coefficients."] = "affine"
    layerwise: Annotated[bool, "Separate coefficients for every module.", "gradient solver"] = False
    block_size: Annotated[
        int | None, "Separate coefficients for every N elements; 0: per tensor.", "gradient solver"
    ] = None
    epochs: Annotated[int, "Passes over the data.", "gradient solver"] = 10
    lr: Annotated[
        float | None,
        "Learning rate of x in weight units (authors: 0.001); default 0.02 (train 0.0002) of the mean distance.",
        "gradient solver",
    ] = None
    optimizer: Annotated[Literal["adamw", "sgd"], "Optimizer of x; sgd has momentum 0.9.", "gradient solver"] = "adamw"
    weight_decay: Annotated[float, "Decay towards the mean of all candidates.", "gradient solver"] = 0.0
    clip: Annotated[float | None, "Largest norm of the gradient of x.", "gradient solver"] = None
    sam_rho: Annotated[float, "Radius of a sharpness-aware (SAM) step.", "gradient solver"] = 0.0
    patience: Annotated[int | None, "Stop after N epochs without a better held-out score.", "gradient solver"] = None
    evaluations: Annotated[int, "Scores to spend with --score-cmd or --lm-eval.", "search by scores"] = 100

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("patience", 1), ("block_size", 0), ("evaluations", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        for name in ("lr", "clip", "radius"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name} must be greater than 0, not {value}")
        for name in ("weight_decay", "sam_rho"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        import torch

        if self.solver == "quadratic":
            return self._by_surrogate(objective)
        if not (objective.losses is not None):
            return self._by_scores(objective)
        groups = (
            losses_of(objective).blocks(self.block_size)
            if self.layerwise or self.block_size is not None
            else EVERYTHING
        )
        fit, monitored = self._splits(objective)
        distance_GN = losses_of(objective).distances(groups)
        if self.lr is None:
            mean_G1 = distance_GN.mean(dim=1, keepdim=True)
            distance_GN = torch.where(mean_G1 > 0, distance_GN / mean_G1, distance_GN)
        x_GN = torch.zeros_like(distance_GN, requires_grad=True)
        per_epoch = losses_of(objective).batches(fit)
        optimizer, schedule = self._optimizer(
            x_GN, self.epochs * per_epoch, self.lr or RATE[self.on or objective.scored_on]
        )
        losses: list[Tensor] = []
        trace: list[float] = []
        best, scores = x_GN.detach().clone(), list[float]()
        if self.patience is not None:
            scores.append(objective.score(_answer(best, distance_GN, self.constraint, groups), monitored).value)
        for epoch in range(self.epochs):
            for _ in range(per_epoch):
                losses.append(self._gradient(objective, x_GN, distance_GN, fit, groups))
                optimizer.step()
                schedule.step()
                objective.progress(
                    "training the coefficients", len(losses), self.epochs * per_epoch, epoch=epoch + 1, loss=losses[-1]
                )
            trace += torch.stack(losses[len(trace) :]).tolist()
            check_losses(trace[-per_epoch:], losses_of(objective).batches(fit), fit, first=len(trace) - per_epoch)
            if self.patience is None:
                best = x_GN.detach()
                continue
            value = objective.score(_answer(x_GN, distance_GN, self.constraint, groups), monitored).value
            if value > max(scores):
                best = x_GN.detach().clone()
            scores.append(value)
            if len(scores) - 1 - scores.index(max(scores)) >= self.patience:
                break
        coefficients = _answer(best, distance_GN, self.constraint, groups)
        return Learned(
            coefficients=coefficients,
            trace={"loss": trace} | ({"held_out_score": scores} if scores else {}),
            notes=_outliers(coefficients),
        )

    def _by_surrogate(self, objective: Objective) -> Learned:
        """Return the best point by real loss on the way from the mean to the optimum of the quadratic.

        The optimum is affine in the ball ‖x‖ ≤ radius, or on the simplex; see `ckptavg.surrogate`. Points on the
        segment from the mean are scored. Then the quadratic is recentered at the best of them: value and gradient of
        the real loss there, with the second derivatives kept, at the cost of a forward and a backward pass. The segment
        from there to the new optimum is scored in turn, until no point is better, at most `MOVES` times.
        """
        import torch

        from ckptavg.surrogate.optimum import affine_optimum, simplex_optimum

        if not (objective.losses is not None):
            raise UsageError("the quadratic solver needs a loss, not scores alone", hint="--solver gradient")
        if self.layerwise or self.block_size is not None:
            raise UsageError("the quadratic solver has one coefficient per candidate", hint="--solver gradient")
        q = losses_of(objective).surrogate(self.on, self.hessian)
        distance_N = losses_of(objective).distances(EVERYTHING)[0].to("cpu", torch.float64)
        metric_N = distance_N / distance_N.mean().clamp(min=torch.finfo(torch.float64).tiny)
        rows: list[dict[str, float | str | None]] = []
        start_N = torch.full_like(distance_N, 1 / objective.n)
        chosen, lowest = Coefficients.uniform(range(objective.n), objective.n), math.inf
        for segment in range(1 + MOVES):
            if segment:
                q = q.recentered(start_N, *losses_of(objective).gradient(chosen, self.on))
            best_N = simplex_optimum(q) if self.constraint == "simplex" else affine_optimum(q, self.radius, metric_N)
            # the start of a later segment is already scored
            ways = [i / (SEGMENT - 1) for i in range(min(1, segment), SEGMENT)]
            mixed = [(1 - t) * start_N + t * best_N for t in ways]
            points = [Coefficients((tuple((row_N / row_N.sum()).tolist()),)) for row_N in mixed]
            objective.prefetch(points)
            better = False
            for t, row_N, point in zip(ways, mixed, points, strict=True):
                loss = objective.score(point).loss or 0.0
                rows.append({"segment": segment + 1, "of the way": t, "quadratic": float(q(row_N)), "loss": loss})
                objective.progress("verifying along the segment", len(rows), SEGMENT + MOVES * (SEGMENT - 1), loss=loss)
                if loss < lowest:
                    chosen, lowest, better = point, loss, t > 0
            if not better:
                break
            start_N = torch.tensor(chosen.values[0], dtype=torch.float64)
        return Learned(
            coefficients=chosen,
            notes=[*([q.note] if q.note else []), *_outliers(chosen)],
            tables={"from the mean to the optimum of the quadratic": rows},
        )

    def _by_scores(self, objective: Objective) -> Learned:
        """Search by CMA-ES on x in units of the distances, from the mean of all, with ``evaluations`` scores.

        Returns the best of all scored coefficients. Source: Hansen 2016, The CMA Evolution Strategy, a tutorial,
        arXiv:1604.00772, implemented by its author's library.
        """
        import torch

        if self.layerwise or self.block_size is not None:
            raise UsageError("layer-wise coefficients need a loss, not scores alone")
        n = objective.n
        seed = int(torch.randint(1, 2**31, (1,), generator=objective.generator))
        best, best_value = Coefficients.uniform(range(n), n), -math.inf
        trace: list[float] = []

        def at(x: Sequence[float]) -> Coefficients:
            x_N = torch.tensor(x, dtype=torch.float64)[None]
            return _answer(x_N, torch.ones_like(x_N), self.constraint, EVERYTHING)

        def cost(x: Sequence[float]) -> float:
            nonlocal best, best_value
            coefficients = at(x)
            value = objective.score(coefficients).value
            if value > best_value:
                best, best_value = coefficients, value
            trace.append(best_value)
            objective.progress("searching by scores", len(trace), self.evaluations, score=best_value)
            return -value

        cost([0.0] * n)
        search = _cma(n, seed)
        while n > 1 and len(trace) < self.evaluations and not search.stop():
            proposals = search.ask(min(search.popsize, self.evaluations - len(trace)))
            objective.prefetch([at(x) for x in proposals])
            costs = [cost(x) for x in proposals]
            if len(costs) == search.popsize:
                search.tell(proposals, costs)
        return Learned(coefficients=best, trace={"best_score": trace}, notes=_outliers(best))

    def _splits(self, objective: Objective) -> tuple[Split, Split]:
        """Return the split to train on and the split to monitor, which never share examples if ``patience`` is set."""
        fit = self.on or objective.scored_on
        if self.patience is None or fit != objective.scored_on:
            return fit, objective.scored_on
        return "fit", "held"

    def _optimizer(
        self, x_GN: Tensor, steps: int, lr: float
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """Return AdamW or SGD on x, and its schedule: linear warm-up over a fifth of the steps, then a cosine to 0."""
        import torch

        optimizer = (
            torch.optim.AdamW([x_GN], lr=lr, weight_decay=self.weight_decay)
            if self.optimizer == "adamw"
            else torch.optim.SGD([x_GN], lr=lr, momentum=0.9, weight_decay=self.weight_decay)
        )
        warmup = steps // 5
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: (
                (step + 1) / warmup
                if step < warmup
                else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
            ),
        )

    def _gradient(self, objective: Objective, x_GN: Tensor, distance_GN: Tensor, fit: Split, groups: Groups) -> Tensor:
        """Set x.grad to the gradient of the loss, or SAM loss, of the next batch; return the loss at x."""
        import torch

        def backward(*, again: bool) -> Tensor:
            x_GN.grad = None
            c_GN = coefficients_of(x_GN, distance_GN, self.constraint)
            loss = losses_of(objective).loss(c_GN if len(groups) > 1 else c_GN[0], fit, groups=groups, again=again)
            loss.backward()
            return loss.detach()

        loss = backward(again=False)
        assert x_GN.grad is not None
        if self.sam_rho:
            shift_GN = self.sam_rho * x_GN.grad / x_GN.grad.norm().clamp(min=torch.finfo(x_GN.dtype).tiny)
            with torch.no_grad():
                x_GN += shift_GN
            backward(again=True)
            with torch.no_grad():
                x_GN -= shift_GN
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_([x_GN], self.clip)
        return loss


def coefficients_of(x_GN: Tensor, distance_GN: Tensor, constraint: Constraint) -> Tensor:
    """Return β from x: 1/N + x_i/‖w_i − w̄‖ − (1/N)·Σ_j x_j/‖w_j − w̄‖, or softmax(N·x_i/‖w_i − w̄‖).

    Args:
        x_GN: [..., N], coordinates.
        distance_GN: [..., N], ‖w_i − w̄‖; where 0, p_i is 0 and x_i has no effect.
        constraint: affine for the first form, simplex for the second.
    Returns:
        [..., N], each row sums to 1 to rounding, differentiable in x.
    """
    import torch

    n = x_GN.shape[-1]
    inverse_GN = torch.where(distance_GN > 0, 1 / distance_GN, torch.zeros_like(distance_GN))
    y_GN = x_GN * inverse_GN
    if constraint == "simplex":
        return torch.softmax(n * y_GN, dim=-1)
    return 1 / n + y_GN - y_GN.mean(dim=-1, keepdim=True)


def _cma(n: int, seed: int) -> Any:
    """Return CMA-ES over n coordinates, started at 0, the mean of all candidates, with steps of 1/n."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its import probes for matplotlib
            import cma
            import numpy as np
    except ImportError as error:
        raise UsageError("a search by scores needs the package cma", hint="pip install 'ckptavg[score]'") from error
    normal = np.random.default_rng(seed).standard_normal  # by default cma seeds numpy's global generator
    options = {"randn": lambda *shape: normal(shape), "seed": math.nan, "verbose": -9, "verb_log": 0}
    return cma.CMAEvolutionStrategy(n * [0.0], 1 / n, options)


def _answer(x_GN: Tensor, distance_GN: Tensor, constraint: Constraint, groups: Groups) -> Coefficients:
    import torch

    # on the CPU, because rows cannot sum to 1 on a device without float64
    x, distance = x_GN.detach().to("cpu", torch.float64), distance_GN.to("cpu", torch.float64)
    beta = coefficients_of(x, distance, constraint)
    if not bool(torch.isfinite(beta).all()) or float((beta.sum(dim=-1) - 1).abs().max()) > beta.shape[-1] * 2**-40:
        raise UsageError("the coefficients diverged", hint="choose a smaller --lr, or --clip")
    return Coefficients(tuple(map(tuple, beta.tolist())), groups)


def _outliers(coefficients: Coefficients) -> list[str]:
    far = [c for row in coefficients.values for c in row if not FAR[0] <= c <= FAR[1]]
    if not far:
        return []
    extreme = max(far, key=abs)
    return [
        f"{len(far)} coefficients lie outside [−1, 2], up to {extreme:.2f}, which suggests overfitting; "
        "try --constraint simplex, --weight-decay or --patience"
    ]


STRATEGY: type[Strategy] = TWA
