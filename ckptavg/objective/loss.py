"""Loss of a mixture and its gradient in the coefficients, as one node of torch's graph.

Shape suffixes: N = candidates, G = groups of tensors.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ckptavg.batches.stream import LocalShard
from ckptavg.coefficients import EVERYTHING, Groups
from ckptavg.errors import TaskError, is_out_of_memory
from ckptavg.objective import batchnorm
from ckptavg.objective.mixed_model import MixedModel
from ckptavg.objective.precision import autocast
from ckptavg.runtime.workers import Workers


class MixtureLoss(torch.autograd.Function):
    """ℓ(Pᵀc) with the gradient P·∂ℓ/∂w, computed in the forward call because the model's state is shared."""

    @staticmethod
    def forward(ctx: Any, c_GN: Tensor, compute: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Return the loss; ``compute`` returns it with its gradient in the shape of c."""
        loss, gradient_GN = compute(c_GN)
        ctx.save_for_backward(gradient_GN)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        """Return the gradient saved by `forward`, times ``upstream``."""
        (gradient_GN,) = ctx.saved_tensors
        return upstream[0] * gradient_GN, None


def loss_and_gradient(
    mixed: MixedModel, c_GN: Tensor, share: LocalShard, groups: Groups, workers: Workers
) -> tuple[Tensor, Tensor]:
    """Return the mean loss at c on a batch, and ∂ℓ/∂c in the shape of c; BatchNorm uses the batch's own statistics.

    Only the forward pass runs in the model's precision; mixture and pullback keep the precision of the candidates.

    With ℓ_r the loss of rank r's share and u_r its weight, ℓ = Σ_r u_r ℓ_r / Σ_r u_r and ∂ℓ/∂c likewise: an all-reduce
    of 2 + G·N float64 numbers, and nothing of the size of the model.

    Raises:
        TaskError: if the loss has no gradient.
    """
    ((_, loss, gradient_GN),) = losses_and_gradients(mixed, c_GN, share, groups)
    weight = c_GN.new_full((1,), share.weight)
    sums = workers.sum(torch.cat([weight, weight * loss, gradient_GN.flatten()]))
    return sums[1] / sums[0], (sums[2:] / sums[0]).view(c_GN.shape)


def losses_and_gradients(
    mixed: MixedModel, c_GN: Tensor, share: LocalShard, groups: Groups = EVERYTHING, parts: int = 1
) -> list[tuple[float, Tensor, Tensor]]:
    """Return for each part of a rank's own share: its examples, its mean loss, and weight·∂ℓ/∂c in the shape of c.

    Raises:
        TaskError: if the loss has no gradient.
    """
    task, candidates, model = mixed.task, mixed.candidates, mixed.model
    mixed.approach(c_GN, groups)
    found: list[tuple[float, Tensor, Tensor]] = []
    with torch.enable_grad(), batchnorm.batch_statistics(mixed.norms), without_cudnn_recurrence(model):
        with autocast(mixed.precision, c_GN.device):
            losses = part_losses(mixed.counted.call(task.loss, share.batch), share.size, parts)
        if not losses[0][1].requires_grad:
            raise TaskError("loss() has no gradient: does it use no_grad, detach or item()?", path=task.source)
        for left, (examples, loss) in enumerate(losses, 1 - len(losses)):
            candidates.zero_gradient()
            try:
                # not `loss.backward(weight)`: a given gradient makes torch import sympy, in half a second
                (share.weight * loss).backward(retain_graph=left < 0)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                message = f"loss() cannot be differentiated: {str(error).splitlines()[0]}"
                raise TaskError(message, path=task.source) from error
            found.append((examples, loss.detach().to(c_GN.dtype), candidates.pullback(groups).to(c_GN.dtype)))
    return found


def part_losses(loss: Tensor, examples: int, parts: int) -> list[tuple[float, Tensor]]:
    """Return the number of examples and the mean loss of each of the ``parts`` of a batch, or of the whole.

    Every p-th example is in one part, so that data sorted by class have all classes in each. A batch's mean loss cannot
    be divided, nor can fewer examples than parts.
    """
    if loss.ndim == 0 or loss.numel() < parts:
        return [(examples, loss.mean())]
    each = [loss.flatten()[part::parts] for part in range(parts)]
    return [(examples * part.numel() / loss.numel(), part.mean()) for part in each]


def without_cudnn_recurrence(model: nn.Module) -> AbstractContextManager[None]:
    """Disable cuDNN for recurrent layers: it supports backward only in training mode, where dropout is on."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=False, allow_tf32=False)
