"""Kernels that have second derivatives."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ckptavg.objective.loss import without_cudnn_recurrence


@contextmanager
def plain_kernels(model: nn.Module) -> Generator[None]:
    """Run attention and recurrent layers on kernels with forward-mode and second derivatives."""
    flags = torch.backends.mkldnn.set_flags(False)  # its context manager also sets other flags, and warns
    try:
        with sdpa_kernel(SDPBackend.MATH), without_cudnn_recurrence(model):
            yield
    finally:
        torch.backends.mkldnn.set_flags(*flags)
