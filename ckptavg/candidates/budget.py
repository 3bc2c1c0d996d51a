"""How many bits a candidate's element may take for the matrix to fit the device."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

_SHARE: Final = 0.7  # of the free memory; the rest is for activations


def largest(tensors: Iterable[Tensor], n: int, group_size: int, device: torch.device, bits: Iterable[int]) -> int:
    """The largest of ``bits`` at which N candidates, their mean and a gradient take at most 70 % of the free memory.

    Args:
        tensors: the model's.
        n: the number of candidates.
        group_size: elements that share a scale and a zero point.
        device: where the matrix would be.
        bits: what to choose from, falling; the last of them if nothing fits.
    """
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    elements, size = sum(tensor.numel() for tensor in floats), sum(tensor.nbytes for tensor in floats)
    room = _SHARE * free_memory(device) - 2 * size
    choice = 0
    for choice in bits:
        matrix = n * size if choice == 32 else n * elements * (choice / 8 + 8 / group_size) + 4 * elements
        if matrix <= room:
            break
    return choice


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on ``device``; on the host, of the container where it limits them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
    group = Path("/sys/fs/cgroup")  # version 2; a process in a container sees its own
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        limits.append(int(most) - int(used.read_text()))
    return max(0, min(limits))
