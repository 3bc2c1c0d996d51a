"""The same inputs, seed and machine give the same result; and the caller's own random numbers are left alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator
from contextlib import contextmanager

import torch


def seed_all(seed: int) -> None:
    """Seed torch's, Python's and, where it is in use, numpy's global generators: what loaders may shuffle with."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


@contextmanager
def reproducible(seed: int) -> Generator[None]:
    """Run with every global generator seeded and torch set to repeat itself; all of it is put back afterwards.

    TF32 and cuDNN's autotuning are off: they trade equal results for speed.
    """
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    state = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        seed_all(seed)
        cudnn.benchmark, cudnn.allow_tf32 = False, False
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.allow_tf32 = flags[:2]
            torch.set_float32_matmul_precision(flags[2])
            random.setstate(state)
            if numpy is not None:
                sys.modules["numpy"].random.set_state(numpy)
