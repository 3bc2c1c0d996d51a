"""How many bits a candidate's element may take for the matrix to fit the device."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch

_SHARE: Final = 0.7  # of the free memory; the rest is for activations


def largest(
    elements: int, size: int, n: int, group_size: int, device: torch.device, bits: Iterable[int], sharing: int = 1
) -> int:
    """The largest of ``bits`` at which N candidates, their mean and a gradient take at most 70 % of the free memory.

    Args:
        elements: the model's floating-point ones.
        size: their bytes.
        n: the number of candidates.
        group_size: elements that share a scale and a zero point.
        device: where the matrix would be.
        bits: what to choose from, falling; the last of them if nothing fits.
        sharing: how many processes share the host's memory.
    """
    free = free_memory(device) / (sharing if device.type == "cpu" else 1)
    room = _SHARE * free - 2 * size
    choice = 0
    for choice in bits:
        if matrix_bytes(elements, size, n, group_size, choice) <= room:
            break
    return choice


def matrix_bytes(elements: int, size: int, n: int, group_size: int, bits: int) -> int:
    """What N candidates take: scales, zero points and the mean included where they have fewer than 32 bits."""
    return n * size if bits == 32 else round(n * elements * (bits / 8 + 8 / group_size)) + 4 * elements


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
        limits.append(int(most) - int(used.read_text()) + _cached(group / "memory.stat"))
    return max(0, min(limits))


def _cached(statistics: Path) -> int:
    """The bytes of files that the kernel keeps for a container and would give back: the checkpoints, when read."""
    if not statistics.exists():
        return 0
    fields = dict(line.split() for line in statistics.read_text().splitlines())
    return sum(int(fields.get(name, 0)) for name in ("active_file", "inactive_file"))
