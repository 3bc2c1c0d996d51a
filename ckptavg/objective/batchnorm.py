"""Recompute BatchNorm's running statistics, because a checkpoint's own are wrong for any mixture of weights."""

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as Layer  # pyright: ignore[reportPrivateUsage]  # as in update_bn


def layers(model: nn.Module) -> dict[str, Layer]:
    """Return the BatchNorm layers of ``model`` that keep running statistics, by module name."""
    modules = model.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, Layer) and layer.running_mean is not None}


def statistics(model: nn.Module) -> frozenset[str]:
    """Return the state-dict names of the running means and variances of ``model``."""
    buffers = ("running_mean", "running_var")
    return frozenset(f"{name}.{buffer}" if name else buffer for name in layers(model) for buffer in buffers)


@contextmanager
def batch_statistics(norms: Collection[Layer]) -> Generator[None]:
    """Let BatchNorm normalise with each batch's own statistics, in a model that is otherwise in eval mode."""
    for layer in norms:
        layer.train()
    try:
        yield
    finally:
        for layer in norms:
            layer.eval()


def recompute(norms: Collection[Layer], forward: Callable[[], None]) -> None:
    """Replace the running statistics by their cumulative average over one pass, as torch's ``update_bn`` does.

    The average gives every batch equal weight (momentum None). Unlike in ``update_bn``, dropout stays off.

    Args:
        norms: the BatchNorm layers of a model in eval mode; if there are none, ``forward`` is not called.
        forward: runs the model over every batch.
    References:
        Izmailov et al. 2018 (SWA, arXiv:1803.05407), section 3.2; torch.optim.swa_utils.update_bn.
    """
    if not norms:
        return
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None
    try:
        with torch.no_grad(), batch_statistics(norms):
            forward()
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
