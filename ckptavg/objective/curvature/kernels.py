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
    """Attention and recurrent layers by operations that have derivatives of every kind."""
    flags = torch.backends.mkldnn.set_flags(False)  # its context manager sets other things too, and warns
    try:
        with sdpa_kernel(SDPBackend.MATH), without_cudnn_recurrence(model):
            yield
    finally:
        torch.backends.mkldnn.set_flags(*flags)
