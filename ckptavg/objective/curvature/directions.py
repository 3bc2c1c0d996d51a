"""Products of a model's derivatives with the directions from the mean of the candidates to each of them.

Shape suffixes: N = candidates.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, UntypedStorage, autograd, nn

from ckptavg.candidates import Candidates
from ckptavg.candidates.flat import as_real, is_mixable, unique_tensors
from ckptavg.errors import is_out_of_memory
from ckptavg.tasks.batch import Batch

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
Count: TypeAlias = Callable[[str, int], None]


class UnavailableError(Exception):
    """Raised if a curvature is unavailable; ``operation`` if the cause is an operation without the derivative."""

    def __init__(self, reason: str, *, operation: bool = False) -> None:
        super().__init__(reason)
        self.operation = operation


class NoGradientError(Exception):
    """Raised if the loss has no usable gradient, so that neither curvature is available."""


class Directions:
    """The directions d_j = w_j − w̄ as tangents of the weights, in a model that is set to the mean w̄ and stays there.

    Attributes:
        named: the model's parameters that the candidates have, by name; ``weights`` without the names.
        eye_NN: the identity, in the dtype and on the device of all sums.
        forward_kernels: starts a context with kernels that have forward-mode derivatives.
    """

    def __init__(
        self, candidates: Candidates, loss: Loss, count: Count, at_mean: Callable[[], None],
        forward_kernels: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        self.forward_kernels = forward_kernels
        self._candidates = candidates
        self._loss = loss
        self._count = count
        self.n = candidates.n
        self.model = candidates.model
        device = next(self.model.parameters()).device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.eye_NN = torch.eye(self.n, dtype=dtype, device=device)
        candidates.materialize(self.eye_NN.new_full((self.n,), 1 / self.n))
        at_mean()
        # `.data`, here and where it is restored: autograd must not record a change that is undone before backward
        self._mean = {t: t.data.clone() for _, t in unique_tensors(self.model) if is_mixable(t)}
        self.named = {
            name: weight
            for name, weight in self.model.named_parameters()
            if weight in self._mean and weight.requires_grad
        }
        self.weights = list(self.named.values())

    def __getitem__(self, j: int) -> list[Tensor]:
        """Return d_j."""
        # what is copied has no derivative; setting it would change buffers that the graph holds
        if not self._candidates.average([j], last=None):
            self._candidates.materialize(self.eye_NN[j], last=None)
        direction = _laid_out_like(self.weights)
        for difference, weight in zip(direction, self.weights, strict=True):
            torch.sub(weight.data, self._mean[weight], out=difference)
        for tensor, mean in self._mean.items():
            tensor.data.copy_(mean)
        return direction

    def loss(self, batch: Batch) -> Tensor:
        """Return the differentiable mean loss of a batch at the mean."""
        loss = self._loss(self.model, batch.data).mean()
        if not loss.requires_grad:
            raise NoGradientError("loss() has no gradient: does it use no_grad, detach or item()?")
        return loss

    def count(self, batch: Batch, **passes: int) -> None:
        """Record the number of ``forward`` and ``backward`` passes over a batch."""
        for kind, number in passes.items():
            for _ in range(number):
                self._count(kind, batch.size)

    def vjp(self, outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor]) -> Tensor:
        """Return [N], ⟨w_i, Σ_k (∂outputs_k/∂w)ᵀ cotangents_k⟩."""
        self._candidates.zero_gradient()
        # no `inputs` argument: it would bypass the nodes with which `once_differentiable` raises
        autograd.backward([output for output in outputs if output is not None], list(cotangents), retain_graph=True)
        return self._candidates.pullback()[0].to(self.eye_NN)

    def dot(self, left: Sequence[Tensor | None], right: Sequence[Tensor]) -> Tensor:
        """Return Σ_k ⟨left_k, right_k⟩."""
        total = self.eye_NN.new_zeros(())
        for a, b in zip(left, right, strict=True):
            if a is not None:
                a, b = as_real(a.detach()).flatten(), as_real(b).flatten()
                wide = torch.promote_types(b.dtype, torch.float32)
                total += torch.dot(a.to(wide), b.to(wide))
        return total


def _laid_out_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return uninitialised tensors with the storage layout of ``tensors``, which may share storages.

    `torch.autograd.forward_ad.make_dual` copies a tangent of any other layout into a zeroed storage of the size of its
    primal's: for views of one flat vector, that is a vector of the size of the model for each parameter.
    """
    storages: dict[int, UntypedStorage] = {}
    made: list[Tensor] = []
    for tensor in tensors:
        like = tensor.data.untyped_storage()
        if like.data_ptr() not in storages:
            storages[like.data_ptr()] = UntypedStorage(like.nbytes(), device=like.device)
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        storage = storages[like.data_ptr()]
        made.append(empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride()))  # pyright: ignore
    return made


def gradients_of(loss: Tensor, of: Sequence[Tensor], *, again: bool = False) -> Sequence[Tensor | None]:
    """Return ∂ℓ/∂x of each x, None if the loss does not depend on it; ``again`` makes it differentiable."""
    return autograd.grad(loss, of, retain_graph=True, create_graph=again, allow_unused=True)


@contextmanager
def derivatives(*kinds: type[Exception]) -> Generator[None]:
    """Convert errors of operations that lack a derivative to UnavailableError; out-of-memory is raised as is."""
    try:
        yield
    except (*kinds, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UnavailableError(str(error).partition("\n")[0] or type(error).__name__, operation=True) from error
