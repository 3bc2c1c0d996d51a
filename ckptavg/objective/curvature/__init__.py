"""Surrogate of a network: value, gradient and curvature of its mean loss along the candidates, in one pass.

With F(β) the mean loss of the mixture Σ β_i w_i and d_j = w_j − w̄, the surrogate at β = 1/N has

    g_j = ⟨d_j, ∇F⟩,    H_ij = d_iᵀ ∇²F d_j (exact),    H_ij = (J d_i)ᵀ (∂²ℓ/∂o²) (J d_j) (Gauss–Newton),

where o is the model's output and J = ∂o/∂w. Using the differences d_j instead of the w_j makes these the derivatives of
F(β − mean(β) + 1/N): equal to those of F wherever Σ β = 1, as for all mixtures, but without cancellation between large
terms that have no effect there. So Σ_j g_j = 0 and H·1 = 0.

Directions are processed one by one: memory holds one batch and its graph, the candidate matrix, and a few vectors of
the size of the model.

Shape suffixes: N = candidates.
"""

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ckptavg.candidates import Candidates
from ckptavg.errors import TaskError
from ckptavg.objective import Hessian
from ckptavg.objective.curvature import gauss_newton
from ckptavg.objective.curvature.directions import (
    Count,
    Directions,
    Loss,
    NoGradientError,
    UnavailableError,
    derivatives,
    gradients_of,
)  # fmt: skip
from ckptavg.objective.loss import without_cudnn_recurrence
from ckptavg.runtime.workers import ALONE, Workers
from ckptavg.surrogate import Curvature, Surrogate
from ckptavg.tasks.batch import Batch


def surrogate(
    candidates: Candidates, batches: Callable[[], Iterable[Batch]], loss: Loss, *, hessian: Hessian = "auto",
    count: Count = lambda kind, examples: None, source: str | None = None, workers: Workers = ALONE,
    at_mean: Callable[[], None] = lambda: None,
) -> Surrogate:  # fmt: skip
    """Expand the mean loss over examples to second order around the mean of the candidates.

    The model must be in the mode to measure: BatchNorm on batch statistics, dropout off. It is left at the mean.
    Batches are weighted by their number of examples; sums over batches are float64 (float32 on mps).

    Gauss–Newton requires the loss to be a function of the output of one model call: that call is intercepted, and the
    loss is split in two at its output. Tensors are found in tuples, lists, dicts and dataclasses. Gauss–Newton is
    refused if forward and backward mode give different gradients, as for straight-through estimators.

    ``auto`` uses Gauss–Newton if available: it is positive semidefinite for the usual losses, at half the cost. An
    operation that lacks the required derivative, such as fused attention, is replaced by a plain kernel that has it;
    for Gauss–Newton first only in forward mode, so that no graph keeps the matrices of plain attention.

    Passes counted per batch, besides calls of the model, which are counted where they happen: one backward; and per
    candidate two backwards (exact: a double backward costs as much as four forwards), or one forward more for the call
    in forward mode, plus one backward if the model's outputs for N candidates exceed 1 GiB.

    Args:
        batches: starts a pass; called again only if the previous pass failed.
        count: called with each batch that runs ``forward`` or ``backward``.
        source: the task's file, for errors.
        workers: the ranks, each with its own batches; their sums are reduced at the end of the pass.
        at_mean: called once the model is set to the mean, for what else depends on the weights.
    Raises:
        TaskError: if the loss has no gradient or is not finite, or the curvature is unavailable.
    """
    reasons: dict[str, str] = {}
    tried: tuple[Curvature, ...] = ("gauss-newton", "exact") if hessian == "auto" else (hessian,)
    for curvature in tried:
        for plain, forward in _KERNELS[curvature]:
            forward_kernels = partial(_kernels, candidates.model, forward)
            try:
                with _kernels(candidates.model, plain), torch.enable_grad():
                    directions = Directions(candidates, loss, count, at_mean, forward_kernels)
                    value, gradient_N, hessian_NN = _mean(_MEASURE[curvature], directions, batches(), workers)
            except UnavailableError as error:
                reasons[curvature] = f"no {curvature} Hessian: {error}"
                if not error.operation:
                    break
            except NoGradientError as error:
                raise TaskError(str(error), path=source) from error
            else:
                if plain or forward:
                    reasons[curvature] = reasons[curvature].replace("no", "plain kernels for the", 1)
                return Surrogate(value, gradient_N, hessian_NN, curvature, "; ".join(reasons.values()))
    other = {"exact": "--hessian gauss-newton", "gauss-newton": "--hessian exact"}.get(hessian)
    raise TaskError("; ".join(reasons.values()), path=source, hint=other and f"{other} may be possible")


def _exact(d: Directions, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss of a batch at the mean, its gradient [N] and H [N, N], by reverse over reverse.

    The gradient's graph is built once, with one backward pass per direction.
    """
    loss = d.loss(batch)
    gradient_N, hessian_NN = d.eye_NN.new_zeros(d.n), torch.zeros_like(d.eye_NN)
    with derivatives():
        slopes = gradients_of(loss, d.weights, again=True)
        curved = [k for k, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
        for j in range(d.n):
            direction = d[j]
            gradient_N[j] = d.dot(slopes, direction)
            if curved:
                hessian_NN[:, j] = d.vjp([slopes[k] for k in curved], [direction[k] for k in curved])
    d.count(batch, backward=1 + 2 * d.n)
    return loss.detach(), gradient_N, hessian_NN


_MEASURE: Final = {"exact": _exact, "gauss-newton": gauss_newton.measure}
# plain kernels everywhere, and in forward mode, in the order in which they are tried
_KERNELS: Final = {
    "exact": ((False, False), (True, False)), "gauss-newton": ((False, False), (False, True), (True, False)),
}  # fmt: skip


def _mean(
    measure: Callable[[Directions, Batch], tuple[Tensor, Tensor, Tensor]], d: Directions, batches: Iterable[Batch],
    workers: Workers,
) -> tuple[float, Tensor, Tensor]:  # fmt: skip
    """Return F, g [N] and H [N, N] over the batches of all ranks; g and H in float64 on the CPU."""
    n, eye_NN, values = d.n, d.eye_NN, list[Tensor]()
    total, examples = eye_NN.new_zeros(1 + n + n * n), 0
    failure: Exception | None = None
    try:
        for batch in batches:
            value, gradient_N, hessian_NN = measure(d, batch)
            values.append(value)
            total += batch.size * torch.cat([value.view(1).to(eye_NN), gradient_N, hessian_NN.flatten()])
            examples += batch.size
    except (UnavailableError, NoGradientError) as error:
        failure = error
    failure = next((error for error in workers.gather(failure) if error is not None), None)
    if failure is not None:  # on any rank: all ranks then try the next curvature
        try:
            raise failure
        finally:
            del failure  # with this frame it is a cycle, which would keep the graph of the batch
    total = workers.sum(torch.cat([total, eye_NN.new_tensor([examples])])).cpu().double()
    assert total[-1] > 0, "a pass without batches"
    total = total[:-1] / total[-1]
    value, gradient_N, hessian_NN = float(total[0]), total[1 : n + 1], total[n + 1 :].view(n, n)
    if not total[: n + 1].isfinite().all():
        bad = [(i, value) for i, value in enumerate(map(float, values), 1) if not math.isfinite(value)]
        message = f"the loss is {bad[0][1]} in batch {bad[0][0]}" if bad else "the gradient of the loss is not finite"
        raise NoGradientError(f"{message}, at the mean of the candidates")
    if not hessian_NN.isfinite().all():
        raise UnavailableError("second derivatives are not finite")
    hessian_NN = hessian_NN - hessian_NN.mean(dim=0, keepdim=True)
    hessian_NN = hessian_NN - hessian_NN.mean(dim=1, keepdim=True)
    return value, gradient_N - gradient_N.mean(), (hessian_NN + hessian_NN.t()) / 2


@contextmanager
def _kernels(model: nn.Module, plain: bool) -> Generator[None]:
    """Run attention and recurrent layers on ``plain`` kernels, which have forward-mode and second derivatives."""
    if not plain:
        yield
        return
    flags = torch.backends.mkldnn.set_flags(False)  # its context manager also sets other flags, and warns
    try:
        with sdpa_kernel(SDPBackend.MATH), without_cudnn_recurrence(model):
            yield
    finally:
        torch.backends.mkldnn.set_flags(*flags)
