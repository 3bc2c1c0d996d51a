"""The Gauss–Newton part of the second derivatives of a batch's mean loss.

Shape suffixes: N = candidates, M = elements of one output tensor of the model.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, autograd
from torch.autograd import forward_ad
from torch.func import functional_call

from ckptavg.objective.curvature.directions import Directions, UnavailableError, derivatives
from ckptavg.objective.curvature.model_call import Call, detach_outputs, tensors
from ckptavg.objective.precision import quiet
from ckptavg.tasks.batch import Batch

_KEPT: Final = 1 << 30  # bytes; if J d_1 … J d_N are larger, one backward pass per candidate replaces keeping them
_MODEL_ERRORS: Final = (RuntimeError, TypeError, ValueError, AttributeError)  # raised by models given dual tensors


def measure(d: Directions, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss of a batch at the mean, its gradient [N] and H [N, N].

    H_ij = (J d_i)ᵀ (∂²ℓ/∂o²) (J d_j): J d_j by forward mode, ∂²ℓ/∂o² by a double backward through the loss.
    """
    n = d.n
    with quiet(), forward_ad.dual_level():  # the first dual number imports torch's decompositions, which warn
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    with detach_outputs(d.model) as call:
        loss = d.loss(batch)
    slopes = call.gradients(loss, d.weights)
    gradient_N, forward_N, scale_N = d.eye_NN.new_zeros(3, n)
    hessian_NN = torch.zeros_like(d.eye_NN)
    wide = [torch.promote_types(slope.dtype, torch.float32) for slope in slopes]
    keeps = n * sum(o.numel() * dtype.itemsize for o, dtype in zip(call.outputs, wide, strict=True)) <= _KEPT
    kept = [o.new_empty(n, o.numel(), dtype=t) for o, t in zip(call.outputs, wide, strict=True)] if keeps else []
    cotangents = [slope.detach() for slope in slopes]
    with derivatives():
        gradient = autograd.grad(call.outputs, d.weights, cotangents, retain_graph=not keeps, allow_unused=True)
    for j in range(n):
        direction = d[j]
        tangents = _jvp(d, call, direction)
        gradient_N[j], forward_N[j] = d.dot(gradient, direction), d.dot(cotangents, tangents)
        scale_N[j] = (d.dot(cotangents, cotangents) * d.dot(tangents, tangents)).sqrt()
        with derivatives():
            bent = call.hvp(slopes, tangents)
            if not keeps:
                hessian_NN[:, j] = d.vjp(call.outputs, bent)
        for k, tangents_NM in enumerate(kept):
            tangents_NM[j] = tangents[k].flatten()
            hessian_NN[: j + 1, j] += tangents_NM[: j + 1] @ bent[k].flatten().to(tangents_NM)
    if keeps:
        hessian_NN = hessian_NN.triu() + hessian_NN.triu(1).t()
    d.count(batch, backward=1 if keeps else 1 + n, forward=n)
    slack_N = max(torch.finfo(tensor.dtype).eps for tensor in (*call.outputs, *d.weights)) ** 0.5 * scale_N
    off_N = (forward_N - gradient_N).abs() - slack_N - 0.05 * gradient_N.abs().max()
    no_curvature = (hessian_NN == 0).all() & (slack_N > 0).any()
    differ, flat = torch.stack([(off_N > 0).any(), no_curvature]).tolist()  # waits for the device once
    if differ:
        raise UnavailableError("forward- and backward-mode derivatives of the model disagree")
    if flat:
        raise UnavailableError("loss() has no curvature in the model's output")
    return loss.detach(), forward_N, hessian_NN


def _jvp(d: Directions, call: Call, direction: Sequence[Tensor]) -> list[Tensor]:
    """Return J d for each tensor in ``call.outputs``."""
    tangents: list[Tensor] = []
    with (
        derivatives(*_MODEL_ERRORS), d.forward_kernels(), torch.no_grad(), forward_ad.dual_level(), _slow_attention(),
        call.autocast(),
    ):  # fmt: skip
        named = zip(d.named.items(), direction, strict=True)
        duals = {name: forward_ad.make_dual(weight.data, tangent) for (name, weight), tangent in named}
        outputs = tensors(functional_call(d.model, duals, call.args, call.kwargs))
        for place, output in zip(call.places, call.outputs, strict=True):
            if place >= len(outputs) or outputs[place].shape != output.shape:
                raise UnavailableError("a second call of the model returns tensors of other shapes")
            tangent = forward_ad.unpack_dual(outputs[place]).tangent
            copied = torch.zeros_like(output)  # a tangent of zeros may have no storage
            tangents.append(copied if tangent is None else copied.copy_(tangent))
    return tangents


@contextmanager
def _slow_attention() -> Generator[None]:
    """Disable the no-gradient fast path of torch's transformer layers, which has no forward-mode derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
