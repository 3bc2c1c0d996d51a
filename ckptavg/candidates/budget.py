"""Choose the number of bits per element so that the candidate matrix fits the device."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

_SHARE: Final = 0.7  # fraction of free memory to use; the rest is left for activations


def largest(
    elements: int, size: int, n: int, group_size: int, device: torch.device, bits: Sequence[int], sharing: int = 1
) -> int:
    """Return the largest of ``bits`` at which N candidates, their mean and a gradient take at most 70 % of free memory.

    Args:
        elements, size, n, group_size, device: see `ckptavg.candidates.plan.Plan`.
        bits: candidate values in descending order; the last one is returned if nothing fits.
        sharing: number of processes that share the host memory.
    """
    free = free_memory(device) / (sharing if device.type == "cpu" else 1)
    limit = _SHARE * free - 2 * size
    return next((b for b in bits if matrix_bytes(elements, size, n, group_size, b) <= limit), bits[-1])


def matrix_bytes(elements: int, size: int, n: int, group_size: int, bits: int) -> int:
    """Return the size of N candidates in bytes; below 32 bits, including scales, zero points and the mean."""
    return n * size if bits == 32 else round(n * elements * (bits / 8 + 8 / group_size)) + 4 * elements


def free_memory(device: torch.device) -> int:
    """Return the free bytes on ``device``; on the host, at most what the container's memory limit leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
    group = Path("/sys/fs/cgroup")  # cgroup v2; inside a container this is its own group
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (maximum := limit.read_text().strip()).isdigit():
        limits.append(int(maximum) - int(used.read_text()) + _cached(group / "memory.stat"))
    return max(0, min(limits))


def _cached(statistics: Path) -> int:
    """Return the container's reclaimable page cache in bytes, which grows as checkpoints are read."""
    if not statistics.exists():
        return 0
    fields = dict(line.split() for line in statistics.read_text().splitlines())
    return sum(int(fields.get(name, 0)) for name in ("active_file", "inactive_file"))
