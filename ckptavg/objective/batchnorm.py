"""Recompute BatchNorm's running statistics: those of a checkpoint are wrong for any mixture it enters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as Layer  # pyright: ignore[reportPrivateUsage]  # as in update_bn


def layers(model: nn.Module) -> dict[str, Layer]:
    """The BatchNorm layers of ``model`` that keep running statistics, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Layer) and module.running_mean is not None
    }


def statistics(model: nn.Module) -> frozenset[str]:
    """The state-dict names of the running means and variances of ``model``."""
    return frozenset(
        f"{name}.{buffer}" if name else buffer for name in layers(model) for buffer in ("running_mean", "running_var")
    )


@contextmanager
def batch_statistics(found: Collection[Layer]) -> Generator[None]:
    """BatchNorm normalising with each batch's own statistics, in a model that is otherwise in eval mode."""
    for layer in found:
        layer.train()
    try:
        yield
    finally:
        for layer in found:
            layer.eval()


def statistics_of(found: Collection[Layer]) -> list[dict[str, Tensor]]:
    """The statistics as they are, and what they are the average of; for `recompute` to go on from."""
    return [dict(layer.named_buffers(recurse=False)) for layer in found]


def recompute(found: Collection[Layer], forward: Callable[[], None], state: Any = None) -> None:
    """Replace the running statistics by their cumulative average over one pass, as torch's ``update_bn`` does.

    The average gives every batch equal weight (momentum None). Dropout stays off, unlike there.

    Args:
        found: the layers, of a model in eval mode; where there are none, nothing is run.
        forward: runs the model over every batch.
        state: what `statistics_of` gave after some of the batches, which ``forward`` then leaves out.
    References:
        Izmailov et al. 2018 (SWA, arXiv:1803.05407), section 3.2; torch.optim.swa_utils.update_bn.
    """
    if not found:
        return
    momenta = [layer.momentum for layer in found]
    for layer in found:
        layer.reset_running_stats()
        layer.momentum = None
    for layer, buffers in zip(found, state or [], strict=False):
        for name, value in buffers.items():
            getattr(layer, name).copy_(value)
    try:
        with torch.no_grad(), batch_statistics(found):
            forward()
    finally:
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum
