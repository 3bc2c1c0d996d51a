"""Surrogate of a network: value, gradient and curvature of its mean loss along the candidates, in one pass.

With F(β) the mean loss of the mixture Σ β_i w_i and d_j = w_j − w̄, the surrogate at β = 1/N has

    g_j = ⟨d_j, ∇F⟩,    H_ij = d_iᵀ ∇²F d_j (exact),    H_ij = (J d_i)ᵀ (∂²ℓ/∂o²) (J d_j) (Gauss–Newton),

where o is the model's output and J = ∂o/∂w. Using the differences d_j instead of the w_j makes these the derivatives of
F(β − mean(β) + 1/N): equal to those of F wherever Σ β = 1, as for all mixtures, but without cancellation between large
terms that have no effect there. So Σ_j g_j = 0 and H·1 = 0.

Directions are processed one by one: memory holds one batch and its graph, the candidate matrix, and a few vectors of
the size of the model.

Shape suffixes: N = candidates, M = elements of one output tensor of the model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, autograd, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from ckptavg.candidates import Candidates
from ckptavg.candidates.flat import unique_tensors
from ckptavg.errors import TaskError
from ckptavg.objective.curvature.kernels import plain_kernels
from ckptavg.objective.curvature.model_call import (
    Call,
    UnavailableError,
    derivatives,
    detach_outputs,
    gradients_of,
    tensors,
)
from ckptavg.runtime.workers import ALONE, Workers
from ckptavg.surrogate import Curvature, Surrogate
from ckptavg.tasks.batch import size as batch_size

Hessian: TypeAlias = Literal["auto", "exact", "gauss-newton"]
Count: TypeAlias = Callable[[str, int], None]

_CURVATURES_TRIED: Final[Mapping[Hessian, tuple[Curvature, ...]]] = {
    "auto": ("gauss-newton", "exact"),  # Gauss–Newton is positive semidefinite for the usual losses, at half the cost
    "exact": ("exact",),
    "gauss-newton": ("gauss-newton",),
}
_KEPT: Final = 1 << 30  # bytes; if J d_1 … J d_N are larger, one backward pass per candidate replaces keeping them
_MODEL_ERRORS: Final = (RuntimeError, TypeError, ValueError, AttributeError)  # raised by models given dual tensors


def surrogate(
    candidates: Candidates,
    batches: Callable[[], Iterable[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    hessian: Hessian = "auto",
    count: Count = lambda kind, examples: None,
    source: str | None = None,
    workers: Workers = ALONE,
) -> Surrogate:
    """Expand the mean loss over examples to second order around the mean of the candidates.

    The model must be in the mode to measure: BatchNorm on batch statistics, dropout off. It is left at the mean.
    Batches are weighted by their number of examples; sums over batches are float64 (float32 on mps).

    Gauss–Newton requires the loss to be a function of the output of one model call: that call is intercepted, and the
    loss is split in two at its output. Tensors are found in tuples, lists, dicts and dataclasses. Gauss–Newton is
    refused if forward and backward mode give different gradients, as for straight-through estimators.

    ``auto`` uses Gauss–Newton if available. An operation that lacks the required derivative, such as fused attention,
    is first replaced by a plain kernel that has it.

    Passes counted per batch, besides the forward pass, which the source of the batches counts: one backward; and per
    candidate two backwards (exact: a double backward costs as much as four forwards), or two forwards (a forward-mode
    pass) plus one backward if the model's outputs for N candidates exceed 1 GiB.

    Args:
        candidates: the candidate matrix and the model.
        batches: starts a pass; called again only if the previous pass failed.
        loss: the task's loss.
        hessian: the curvature to compute.
        count: called with each batch that runs ``forward`` or ``backward``.
        source: the task's file, for errors.
        workers: the ranks, each with its own batches; their sums are reduced at the end of the pass.
    Raises:
        TaskError: if the loss has no gradient or is not finite, or the curvature is unavailable.
    """
    reasons: dict[str, str] = {}
    for curvature in _CURVATURES_TRIED[hessian]:
        for plain in (False, True):
            try:
                with plain_kernels(candidates.model) if plain else nullcontext(), torch.enable_grad():
                    curvature_pass = _Pass(candidates, loss, curvature, count)
                    value, gradient_N, hessian_NN = curvature_pass.run(batches(), workers)
            except UnavailableError as error:
                reasons[curvature] = f"no {curvature} Hessian: {error}"
                if not error.operation:
                    break
            except _NoGradientError as error:
                raise TaskError(str(error), path=source) from error
            else:
                if plain:
                    reasons[curvature] = reasons[curvature].replace("no", "plain kernels for the", 1)
                return Surrogate(value, gradient_N, hessian_NN, curvature, "; ".join(reasons.values()))
    other = {"exact": "--hessian gauss-newton", "gauss-newton": "--hessian exact"}.get(hessian)
    raise TaskError("; ".join(reasons.values()), path=source, hint=other and f"{other} may be possible")


class _NoGradientError(Exception):
    """Raised if the loss has no usable gradient, so that neither curvature is available."""


class _Pass:
    """One pass over the data at the mean of the candidates, summing value, gradient and one kind of curvature."""

    def __init__(
        self, candidates: Candidates, loss: Callable[[nn.Module, Any], Tensor], curvature: Curvature, count: Count
    ) -> None:
        self._candidates = candidates
        self._model = candidates.model
        self._loss = loss
        self._count = count
        self._measure = self._exact if curvature == "exact" else self._gauss_newton
        if curvature == "gauss-newton":
            _load_forward_mode()
        mixed = [tensor for _, tensor in unique_tensors(self._model) if tensor.is_floating_point()]
        mixed_ids = {id(tensor) for tensor in mixed}
        named = [(name, weight) for name, weight in self._model.named_parameters() if id(weight) in mixed_ids]
        self._names = [name for name, _ in named]
        self._weights = [weight for _, weight in named]
        device = self._weights[0].device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        n = candidates.n
        self._one_NN = torch.eye(n, dtype=self._dtype, device=device)
        candidates.materialize(torch.full((n,), 1 / n, dtype=self._dtype, device=device))
        # `.data`, here and where it is restored: autograd must not record a change that is undone before backward
        self._mean = [(tensor, tensor.data.clone()) for tensor in mixed]
        self._mean_of = {id(tensor): mean for tensor, mean in self._mean}

    def run(self, batches: Iterable[Any], workers: Workers) -> tuple[float, Tensor, Tensor]:
        """Return F, g [N] and H [N, N] over the batches of all ranks; g and H in float64 on the CPU."""
        n, values = self._candidates.n, list[Tensor]()
        sums: dict[str, Any] = {"examples": 0, "total": self._one_NN.new_zeros(1 + n + n * n)}
        failure: Exception | None = None
        try:
            for batch in batches:
                size = batch_size(batch)
                value, gradient_N, hessian_NN = self._measure(batch)
                values.append(value)
                sums["total"] += size * torch.cat([value.view(1), gradient_N, hessian_NN.flatten()])
                sums["examples"] += size
        except (UnavailableError, _NoGradientError) as error:
            failure = error
        failure = next((error for error in workers.gather(failure) if error is not None), None)
        if failure is not None:  # on any rank: all ranks then try the next curvature
            raise failure
        total = workers.sum(torch.cat([sums["total"], sums["total"].new_tensor([sums["examples"]])])).cpu().double()
        assert total[-1] > 0, "a pass without batches"
        total = total[:-1] / total[-1]
        value, gradient_N, hessian_NN = float(total[0]), total[1 : n + 1], total[n + 1 :].view(n, n)
        if not total[: n + 1].isfinite().all():
            bad = [(i, value) for i, value in enumerate(map(float, values), 1) if not math.isfinite(value)]
            message = "the gradient of loss() is not finite"
            if bad:
                message = f"loss() gave {bad[0][1]} in batch {bad[0][0]}"
            raise _NoGradientError(f"{message}, at the mean of the candidates")
        if not hessian_NN.isfinite().all():
            raise UnavailableError("second derivatives are not finite")
        hessian_NN = hessian_NN - hessian_NN.mean(dim=0, keepdim=True)
        hessian_NN = hessian_NN - hessian_NN.mean(dim=1, keepdim=True)
        return value, gradient_N - gradient_N.mean(), (hessian_NN + hessian_NN.t()) / 2

    def _exact(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Compute H by reverse over reverse: build the gradient's graph once, then run backward per direction."""
        loss = self._mean_loss(batch)
        gradient_N, hessian_NN = self._one_NN.new_zeros(self._candidates.n), torch.zeros_like(self._one_NN)
        with derivatives():
            slopes = gradients_of(loss, self._weights, again=True)
            curved = [k for k, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
            for j in range(self._candidates.n):
                direction = self._direction(j)
                gradient_N[j] = self._dot(slopes, direction)
                if curved:
                    cotangents = [direction[k] for k in curved]
                    hessian_NN[:, j] = self._vjp([slopes[k] for k in curved], cotangents)
        self._count_passes(batch, backward=1 + 2 * self._candidates.n)
        return loss.detach().to(self._dtype), gradient_N, hessian_NN

    def _gauss_newton(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Compute J d_j by forward mode, and ∂²ℓ/∂o² by a double backward through the loss after the model's output."""
        n = self._candidates.n
        with detach_outputs(self._model) as call:
            loss = self._mean_loss(batch)
        slopes = call.gradients(loss, self._weights)
        gradient_N, forward_N, scale_N = self._one_NN.new_zeros(3, n)
        hessian_NN = torch.zeros_like(self._one_NN)
        wide = [torch.promote_types(slope.dtype, torch.float32) for slope in slopes]
        keeps = n * sum(o.numel() * dtype.itemsize for o, dtype in zip(call.outputs, wide, strict=True)) <= _KEPT
        kept = [o.new_empty(n, o.numel(), dtype=d) for o, d in zip(call.outputs, wide, strict=True)] if keeps else []
        flat = [slope.detach() for slope in slopes]
        with derivatives():
            gradient = autograd.grad(call.outputs, self._weights, flat, retain_graph=not keeps, allow_unused=True)
        for j in range(n):
            direction = self._direction(j)
            tangents = self._jvp(call, direction)
            gradient_N[j], forward_N[j] = self._dot(gradient, direction), self._dot(flat, tangents)
            scale_N[j] = (self._dot(flat, flat) * self._dot(tangents, tangents)).sqrt()
            with derivatives():
                bent = call.hvp(slopes, tangents)
                if not keeps:
                    hessian_NN[:, j] = self._vjp(call.outputs, bent)
            for k, tangents_NM in enumerate(kept):
                tangents_NM[j] = tangents[k].flatten()
                hessian_NN[: j + 1, j] += tangents_NM[: j + 1] @ bent[k].flatten().to(tangents_NM)
        if keeps:
            hessian_NN = hessian_NN.triu() + hessian_NN.triu(1).t()
        self._count_passes(batch, backward=1 if keeps else 1 + n, forward=2 * n)
        coarse = max(torch.finfo(tensor.dtype).eps for tensor in (*call.outputs, *self._weights))
        _check(gradient_N, forward_N, coarse**0.5 * scale_N, hessian_NN)
        return loss.detach().to(self._dtype), forward_N, hessian_NN

    def _mean_loss(self, batch: Any) -> Tensor:
        loss = self._loss(self._model, batch).mean()
        if not loss.requires_grad:
            raise _NoGradientError("loss() has no gradient: does it use no_grad, detach or item()?")
        return loss

    def _direction(self, j: int) -> list[Tensor]:
        """Return d_j as tangents of the weights; the model is restored to the mean afterwards."""
        if not self._candidates.average([j]):
            self._candidates.materialize(self._one_NN[j])
        direction = [weight.data - self._mean_of[id(weight)] for weight in self._weights]
        for tensor, mean in self._mean:
            tensor.data.copy_(mean)
        return direction

    def _jvp(self, call: Call, direction: Sequence[Tensor]) -> list[Tensor]:
        """Return J d for each tensor in ``call.outputs``."""
        tangents: list[Tensor] = []
        with derivatives(*_MODEL_ERRORS), torch.no_grad(), forward_ad.dual_level(), _slow_attention(), call.autocast():
            duals = {
                name: forward_ad.make_dual(weight.data, tangent)
                for name, weight, tangent in zip(self._names, self._weights, direction, strict=True)
            }
            outputs = tensors(functional_call(self._model, duals, call.args, call.kwargs))
            for place, output in zip(call.places, call.outputs, strict=True):
                if place >= len(outputs) or outputs[place].shape != output.shape:
                    raise UnavailableError("a second call of the model returns tensors of other shapes")
                tangent = forward_ad.unpack_dual(outputs[place]).tangent
                # a copy, because a tangent of zeros may have no storage
                copied = torch.zeros_like(output)
                tangents.append(copied if tangent is None else copied.copy_(tangent))
        return tangents

    def _vjp(self, outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor]) -> Tensor:
        """Return [N], ⟨w_i, Σ_k (∂outputs_k/∂w)ᵀ cotangents_k⟩."""
        self._candidates.zero_gradient()
        # no `inputs` argument: it would bypass the nodes with which `once_differentiable` raises
        autograd.backward([output for output in outputs if output is not None], list(cotangents), retain_graph=True)
        return self._candidates.pullback()[0].to(self._dtype)

    def _dot(self, left: Sequence[Tensor | None], right: Sequence[Tensor]) -> Tensor:
        total = self._one_NN.new_zeros(())
        for a, b in zip(left, right, strict=True):
            if a is not None:
                wide = torch.promote_types(b.dtype, torch.float32)
                total += torch.dot(a.detach().flatten().to(wide), b.flatten().to(wide))
        return total

    def _count_passes(self, batch: Any, **times: int) -> None:
        for kind, number in times.items():
            for _ in range(number):
                self._count(kind, batch_size(batch))


def _load_forward_mode() -> None:
    """Trigger torch's imports for the first dual number, ignoring the warning about torch's own use of TorchScript."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextmanager
def _slow_attention() -> Generator[None]:
    """Disable the no-gradient fast path of torch's transformer layers, which has no forward-mode derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _check(backward_N: Tensor, forward_N: Tensor, slack_N: Tensor, hessian_NN: Tensor) -> None:
    """Raise if forward mode is not the transpose of backward mode, or the loss is flat; synchronises once."""
    off = (forward_N - backward_N).abs() - slack_N - 0.05 * backward_N.abs().max()
    differ, flat = torch.stack([(off > 0).any(), (hessian_NN == 0).all() & (slack_N > 0).any()]).tolist()
    if differ:
        raise UnavailableError("forward- and backward-mode derivatives of the model disagree")
    if flat:
        raise UnavailableError("loss() has no curvature in the model's output")
