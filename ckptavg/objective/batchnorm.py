"""Recompute BatchNorm's running statistics, because a checkpoint's own are wrong for any mixture of weights."""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as Layer  # pyright: ignore[reportPrivateUsage]  # as in update_bn

from ckptavg.errors import TaskError


def layers(model: nn.Module) -> dict[str, Layer]:
    """Return the BatchNorm layers of ``model`` that keep running statistics, by module name."""
    modules = model.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, Layer) and layer.running_mean is not None}


def statistics(model: nn.Module) -> frozenset[str]:
    """Return the state-dict names of the running means and variances of ``model``."""
    buffers = ("running_mean", "running_var")
    return frozenset(f"{name}.{buffer}" if name else buffer for name in layers(model) for buffer in buffers)


@contextmanager
def batch_statistics(norms: Mapping[str, Layer]) -> Generator[Counter[str]]:
    """Let BatchNorm normalise with each batch's own statistics, in a model that is otherwise in eval mode.

    Layers are in training mode in each of their calls, even if the task's code calls ``model.eval()``.

    Yields:
        the number of calls of each layer.
    """
    calls: Counter[str] = Counter()

    def enter(layer: nn.Module, _: Any, *, name: str) -> None:
        layer.training = True
        calls[name] += 1

    handles = [layer.register_forward_pre_hook(partial(enter, name=name)) for name, layer in norms.items()]
    for layer in norms.values():
        layer.train()
    try:
        yield calls
    finally:
        for handle, layer in zip(handles, norms.values(), strict=True):
            handle.remove()
            layer.eval()


def recompute(norms: Mapping[str, Layer], forward: Callable[[], None]) -> Sequence[str]:
    """Replace the running statistics by their cumulative average over one pass, as torch's ``update_bn`` does.

    The average gives every batch equal weight (momentum None). Unlike in ``update_bn``, dropout stays off. A layer that
    ``forward`` does not call, such as that of an auxiliary head, keeps its statistics.

    Args:
        norms: the BatchNorm layers of a model in eval mode, by name; if there are none, ``forward`` is not called.
        forward: runs the task's loss over every batch.
    Returns:
        the names of the layers that were not called.
    Raises:
        TaskError: if a layer was called and its statistics were not updated, or if no layer was called.
    References:
        Izmailov et al. 2018 (SWA, arXiv:1803.05407), section 3.2; torch.optim.swa_utils.update_bn.
    """
    if not norms:
        return []
    before = {name: [(buffer, buffer.clone()) for buffer in layer.buffers()] for name, layer in norms.items()}
    momenta = [layer.momentum for layer in norms.values()]
    for layer in norms.values():
        layer.reset_running_stats()
        layer.momentum = None
    try:
        with torch.no_grad(), batch_statistics(norms) as calls:
            forward()
    finally:
        for layer, momentum in zip(norms.values(), momenta, strict=True):
            layer.momentum = momentum
    tracked = torch.stack([torch.as_tensor(layer.num_batches_tracked) for layer in norms.values()]).tolist()
    for name, count in zip(norms, tracked, strict=True):
        if count != calls[name]:
            message = (
                f"loss() ran BatchNorm layer {name} {calls[name]} times, which updated its statistics {count} times"
            )
            raise TaskError(message, hint="run the model itself, not a copy or a functional form of it")
    if not any(tracked):
        raise TaskError("loss() runs none of the model's BatchNorm layers, whose statistics are to be recomputed")
    idle = [name for name in norms if not calls[name]]
    for buffer, value in (pair for name in idle for pair in before[name]):
        buffer.copy_(value)
    return idle
