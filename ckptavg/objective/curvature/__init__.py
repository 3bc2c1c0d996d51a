"""The surrogate of a network: value, gradient and curvature of its mean loss along the candidates, in one pass.

With F(β) the mean loss of the mixture Σ β_i w_i and d_j = w_j − w̄, this is, at β = 1/N,

    g_j = ⟨d_j, ∇F⟩,    H_ij = d_iᵀ ∇²F d_j (exact),    H_ij = (J d_i)ᵀ (∂²ℓ/∂o²) (J d_j) (Gauss–Newton),

o being what the model returns and J = ∂o/∂w. Differences instead of the w_j themselves make these the derivatives of
F(β − mean(β) + 1/N): those of F wherever Σ β = 1, where all mixtures lie, without the cancellation of large numbers
that have no say there. So Σ_j g_j = 0 and H·1 = 0.

Directions are taken one by one: what is in memory at a time is one batch and its graph, the candidate matrix, and a few
vectors of the size of the model.

Shape suffixes: N = candidates, M = elements of one tensor that the model returns.
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
from ckptavg.journal.pass_progress import PassProgress, resumed
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

_TRIED: Final[Mapping[Hessian, tuple[Curvature, ...]]] = {
    "auto": ("gauss-newton", "exact"),  # positive semidefinite for the usual losses, and half the price
    "exact": ("exact",),
    "gauss-newton": ("gauss-newton",),
}
_KEPT: Final = 1 << 30  # bytes of J d_1 … J d_N that are kept at a time; beyond, a backward pass each replaces them
_FOREIGN: Final = (RuntimeError, TypeError, ValueError, AttributeError)  # what a model raises on unusual tensors


def surrogate(
    candidates: Candidates,
    batches: Callable[[], Iterable[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    hessian: Hessian = "auto",
    count: Count = lambda kind, examples: None,
    source: str | None = None,
    order: Callable[[], int] = int,
    partial: Callable[[str], PassProgress] = lambda name: PassProgress(),
    workers: Workers = ALONE,
) -> Surrogate:
    """The mean loss over examples around the mean of the candidates, to second order.

    The model must be in the mode it is to be measured in: BatchNorm by batch statistics, dropout off. It is left at
    the mean. Batches weigh as many as they have examples; sums over them are float64 (float32 on mps).

    Gauss–Newton needs the loss to be a function of what one call of the model returned: the call is intercepted, and
    what it returns is where the loss is cut in two. Tensors are found in tuples, lists, dicts and dataclasses. It is
    refused where forward and backward mode give different gradients, as they do for straight-through estimators.

    ``auto`` takes Gauss–Newton where it can be had. An operation without the derivative that is needed, as fused
    attention has none, is first replaced by a plain kernel that has it.

    Counted for each batch, beside the forward pass, which whoever gives the batches counts: a backward; and for each
    candidate two backwards (exact: a double backward costs as much as four forwards), or two forwards (a forward-mode
    pass) and, where the model returns more than 1 GiB for N of them, a backward.

    Args:
        candidates: the matrix and the model.
        batches: begins a pass; a second one is begun only where a first had to be given up.
        loss: the task's.
        hessian: which curvature.
        count: is told each batch that goes ``forward`` or ``backward``.
        source: the task's, for errors.
        order: a checksum of the examples of the pass so far.
        partial: knows how far an earlier run has come with a kind of pass.
        workers: who each have batches of their own; their sums are put together at the end of the pass.
    Raises:
        TaskError: if the loss has no gradient or is not finite, or the curvature cannot be had.
    """
    reasons: dict[str, str] = {}
    for curvature in _TRIED[hessian]:
        for plain in (False, True):
            try:
                with plain_kernels(candidates.model) if plain else nullcontext(), torch.enable_grad():
                    over = _Pass(candidates, loss, curvature, count)
                    done = partial(f"{curvature} {plain}")
                    work = lambda over=over, done=done: over.over(batches(), done, order, workers)  # noqa: E731
                    value, gradient_N, hessian_NN = resumed(done, work)
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
    """No curvature can be had, nor a gradient."""


class _Pass:
    """One pass over the data at the mean of the candidates, adding up value, gradient and one of the curvatures."""

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
        known = {id(tensor) for tensor in mixed}
        named = [(name, weight) for name, weight in self._model.named_parameters() if id(weight) in known]
        self._names = [name for name, _ in named]
        self._weights = [weight for _, weight in named]
        device = self._weights[0].device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        n = candidates.n
        self._one_NN = torch.eye(n, dtype=self._dtype, device=device)
        candidates.materialize(torch.full((n,), 1 / n, dtype=self._dtype, device=device))
        # `.data`, here and where it is put back: autograd must not hear of a change that is undone before it looks
        self._mean = [(tensor, tensor.data.clone()) for tensor in mixed]
        self._mean_of = {id(tensor): mean for tensor, mean in self._mean}

    def over(
        self, batches: Iterable[Any], partial: PassProgress, order: Callable[[], int], workers: Workers
    ) -> tuple[float, Tensor, Tensor]:
        """F, g [N] and H [N, N], these two in float64 on the CPU, over the batches of all workers."""
        n, values = self._candidates.n, list[Tensor]()
        sums: dict[str, Any] = {"examples": 0, "total": self._one_NN.new_zeros(1 + n + n * n)}
        for state in partial.states[-1:]:
            sums = {"examples": state["examples"], "total": state["total"].to(self._one_NN)}
        failure: Exception | None = None
        try:
            for batch in partial.remaining(batches, order, lambda: sums):
                size = batch_size(batch)
                value, gradient_N, hessian_NN = self._measure(batch)
                values.append(value)
                sums["total"] += size * torch.cat([value.view(1), gradient_N, hessian_NN.flatten()])
                sums["examples"] += size
        except (UnavailableError, _NoGradientError) as error:
            failure = error
        failure = next((found for found in workers.gather(failure) if found is not None), None)
        if failure is not None:  # of any worker: all of them look for another way
            raise failure
        total = workers.sum(torch.cat([sums["total"], sums["total"].new_tensor([sums["examples"]])])).cpu().double()
        assert total[-1] > 0, "a pass without batches"
        total = total[:-1] / total[-1]
        value, gradient_N, hessian_NN = float(total[0]), total[1 : n + 1], total[n + 1 :].view(n, n)
        if not total[: n + 1].isfinite().all():
            bad = [(i, one) for i, one in enumerate(map(float, values), 1) if not math.isfinite(one)]
            what = "the gradient of loss() is not finite"
            if bad:
                what = f"loss() gave {bad[0][1]} in batch {bad[0][0]}"
            raise _NoGradientError(f"{what}, at the mean of the candidates")
        if not hessian_NN.isfinite().all():
            raise UnavailableError("second derivatives are not finite")
        hessian_NN = hessian_NN - hessian_NN.mean(dim=0, keepdim=True)
        hessian_NN = hessian_NN - hessian_NN.mean(dim=1, keepdim=True)
        return value, gradient_N - gradient_N.mean(), (hessian_NN + hessian_NN.t()) / 2

    def _exact(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Reverse over reverse: the graph of the gradient once, and backward through it in each direction."""
        loss = self._mean_loss(batch)
        gradient_N, hessian_NN = self._one_NN.new_zeros(self._candidates.n), torch.zeros_like(self._one_NN)
        with derivatives():
            slopes = gradients_of(loss, self._weights, again=True)
            curved = [k for k, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
            for j in range(self._candidates.n):
                direction = self._direction(j)
                gradient_N[j] = self._dot(slopes, direction)
                if curved:
                    ahead = [direction[k] for k in curved]
                    hessian_NN[:, j] = self._pulled_back([slopes[k] for k in curved], ahead)
        self._counted(batch, backward=1 + 2 * self._candidates.n)
        return loss.detach().to(self._dtype), gradient_N, hessian_NN

    def _gauss_newton(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """J d_j by forward mode, ∂²ℓ/∂o² by a double backward through what follows the model."""
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
            tangents = self._pushed_forward(call, direction)
            gradient_N[j], forward_N[j] = self._dot(gradient, direction), self._dot(flat, tangents)
            scale_N[j] = (self._dot(flat, flat) * self._dot(tangents, tangents)).sqrt()
            with derivatives():
                bent = call.hvp(slopes, tangents)
                if not keeps:
                    hessian_NN[:, j] = self._pulled_back(call.outputs, bent)
            for k, tangents_NM in enumerate(kept):
                tangents_NM[j] = tangents[k].flatten()
                hessian_NN[: j + 1, j] += tangents_NM[: j + 1] @ bent[k].flatten().to(tangents_NM)
        if keeps:
            hessian_NN = hessian_NN.triu() + hessian_NN.triu(1).t()
        self._counted(batch, backward=1 if keeps else 1 + n, forward=2 * n)
        coarse = max(torch.finfo(tensor.dtype).eps for tensor in (*call.outputs, *self._weights))
        _check(gradient_N, forward_N, coarse**0.5 * scale_N, hessian_NN)
        return loss.detach().to(self._dtype), forward_N, hessian_NN

    def _mean_loss(self, batch: Any) -> Tensor:
        loss = self._loss(self._model, batch).mean()
        if not loss.requires_grad:
            raise _NoGradientError("loss() gives no gradient: no_grad, detach or item() in it?")
        return loss

    def _direction(self, j: int) -> list[Tensor]:
        """d_j as tangents of the weights; the model is itself again afterwards."""
        if not self._candidates.average([j]):
            self._candidates.materialize(self._one_NN[j])
        found = [weight.data - self._mean_of[id(weight)] for weight in self._weights]
        for tensor, mean in self._mean:
            tensor.data.copy_(mean)
        return found

    def _pushed_forward(self, call: Call, direction: Sequence[Tensor]) -> list[Tensor]:
        """J d, of each tensor that counts among those the model returns."""
        found: list[Tensor] = []
        with derivatives(*_FOREIGN), torch.no_grad(), forward_ad.dual_level(), _slow_attention(), call.autocast():
            duals = {
                name: forward_ad.make_dual(weight.data, tangent)
                for name, weight, tangent in zip(self._names, self._weights, direction, strict=True)
            }
            again = tensors(functional_call(self._model, duals, call.args, call.kwargs))
            for place, output in zip(call.places, call.outputs, strict=True):
                if place >= len(again) or again[place].shape != output.shape:
                    raise UnavailableError("the model returns something else when called again")
                tangent = forward_ad.unpack_dual(again[place]).tangent
                # a copy, for a tangent of zeros may have no memory
                found.append(torch.zeros_like(output) if tangent is None else torch.zeros_like(output).copy_(tangent))
        return found

    def _pulled_back(self, of: Sequence[Tensor | None], by: Sequence[Tensor]) -> Tensor:
        """[N], ⟨w_i, Σ_k (∂of_k/∂w)ᵀ by_k⟩."""
        self._candidates.zero_gradient()
        # without `inputs`, which would step around the nodes by which `once_differentiable` refuses
        autograd.backward([part for part in of if part is not None], list(by), retain_graph=True)
        return self._candidates.pullback()[0].to(self._dtype)

    def _dot(self, left: Sequence[Tensor | None], right: Sequence[Tensor]) -> Tensor:
        found = self._one_NN.new_zeros(())
        for a, b in zip(left, right, strict=True):
            if a is not None:
                wide = torch.promote_types(b.dtype, torch.float32)
                found += torch.dot(a.detach().flatten().to(wide), b.flatten().to(wide))
        return found

    def _counted(self, batch: Any, **times: int) -> None:
        for kind, number in times.items():
            for _ in range(number):
                self._count(kind, batch_size(batch))


def _load_forward_mode() -> None:
    """Import what torch imports at the first dual number, which warns of torch's own use of TorchScript."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextmanager
def _slow_attention() -> Generator[None]:
    """Without the path that torch's transformer layers take where no gradient is asked for: it has no forward mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _check(backward_N: Tensor, forward_N: Tensor, slack_N: Tensor, hessian_NN: Tensor) -> None:
    """Raise where forward mode is not what backward mode is the transpose of, or the loss is flat; looks once."""
    off = (forward_N - backward_N).abs() - slack_N - 0.05 * backward_N.abs().max()
    differ, flat = torch.stack([(off > 0).any(), (hessian_NN == 0).all() & (slack_N > 0).any()]).tolist()
    if differ:
        raise UnavailableError("forward- and backward-mode derivatives of the model disagree")
    if flat:
        raise UnavailableError("loss() has no curvature in what the model returns")
