"""Recompute BatchNorm's running statistics: those of a checkpoint are wrong for any mixture it enters."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # as torch's update_bn does


def layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of ``model`` that keep running statistics, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def statistics(model: nn.Module) -> frozenset[str]:
    """The state-dict names of the running means and variances of ``model``."""
    return frozenset(
        f"{name}.{buffer}" if name else buffer for name in layers(model) for buffer in ("running_mean", "running_var")
    )


@contextmanager
def batch_statistics(model: nn.Module) -> Generator[None]:
    """``model`` in eval mode (dropout off), but BatchNorm normalising with each batch's own statistics."""
    model.eval()
    for layer in layers(model).values():
        layer.train()
    try:
        yield
    finally:
        model.eval()


def recompute(model: nn.Module, forward: Callable[[], None]) -> None:
    """Replace the running statistics by their cumulative average over one pass, as torch's ``update_bn`` does.

    The average gives every batch equal weight (momentum None). Dropout stays off, unlike there.

    Args:
        model: with or without BatchNorm; without, nothing is run.
        forward: runs the model over every batch.
    References:
        Izmailov et al. 2018 (SWA, arXiv:1803.05407), section 3.2; torch.optim.swa_utils.update_bn.
    """
    found = layers(model).values()
    if not found:
        return
    momenta = [layer.momentum for layer in found]
    for layer in found:
        layer.reset_running_stats()
        layer.momentum = None
    try:
        with torch.no_grad(), batch_statistics(model):
            forward()
    finally:
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum
