"""Checkpoints for tests, written by the safetensors library and opened like any others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.coefficients import Coefficients


def stored(folder: Path, states: Iterable[Mapping[str, Tensor]]) -> tuple[Checkpoint, ...]:
    """Write each state as ``step-<i>.safetensors`` and open all of them, including equal ones, unlike discovery."""
    folder.mkdir(exist_ok=True)
    opened: list[Checkpoint] = []
    for i, state in enumerate(states):
        path = folder / f"step-{i}.safetensors"
        save_file(dict(state), path)
        opened += discover([path]).checkpoints
    return tuple(opened)


def averaged(
    checkpoints: tuple[Checkpoint, ...], row: Iterable[float], dtype: str | None = None, chunk: int = 1 << 18
) -> dict[str, Tensor]:
    """Return the average as tensors."""
    specs = output_specs(checkpoints, dtype)
    buffers = {name: bytearray(spec.nbytes) for name, spec in specs.items()}
    for name, offset, data in weighted_average(checkpoints, Coefficients((tuple(row),)), specs, chunk=chunk):
        buffers[name][offset : offset + len(data)] = data
    return {
        name: torch.frombuffer(buffers[name], dtype=TORCH[spec.dtype]).view(spec.shape)
        if spec.nbytes
        else torch.empty(spec.shape, dtype=TORCH[spec.dtype])
        for name, spec in specs.items()
    }
