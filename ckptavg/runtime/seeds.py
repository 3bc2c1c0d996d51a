"""Reproducible random numbers: seed the global generators, and restore the caller's state afterwards."""

import hashlib
import os
import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import numpy
import torch

LACKING: Final = "does not have a deterministic implementation"  # torch's message, after the operation's name


def reseed(seed: int, number: int) -> None:
    """Seed torch's, Python's and numpy's generators for micro-batch ``number``, so its draws depend on no other."""
    if number:
        seed = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:6])
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def seed_loader(loader: Any) -> None:
    """Reset the generators that a data loader owns to the global seed at the start of a pass."""
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generator.manual_seed(torch.initial_seed())


@contextmanager
def preserved() -> Generator[None]:
    """Restore the state of torch's (on the CPU), Python's and numpy's generators afterwards."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])


@contextmanager
def reproducible(seed: int, *, deterministic: bool = False) -> Generator[None]:
    """Run with every global generator seeded and torch configured for repeatable results; restore all of it afterwards.

    TF32 and cuDNN's autotuning are off: they trade reproducibility for speed. If ``deterministic``, an operation
    without a deterministic algorithm raises an error with its name.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at CUDA initialisation, by torch before 2.9
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)  # also of devices that are initialised later
        reseed(seed, 0)
        cudnn.benchmark, cudnn.allow_tf32 = False, False
        torch.set_float32_matmul_precision("highest")
        if deterministic:
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            if deterministic:  # the call imports the compiler, even for False
                torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
            cudnn.benchmark, cudnn.allow_tf32 = flags[:2]
            torch.set_float32_matmul_precision(flags[2])
            random.setstate(states[0])
            numpy.random.set_state(states[1])
