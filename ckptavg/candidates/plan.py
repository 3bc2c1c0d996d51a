"""Estimate the memory that learning needs before it is allocated, and suggest settings that fit."""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, Self, TypeAlias

import torch
from torch import nn

from ckptavg.candidates.copied import Copies
from ckptavg.candidates.flat import is_mixable, real_numel, unique_tensors
from ckptavg.errors import OutOfMemoryError, counted
from ckptavg.runtime import cgroups

Offload: TypeAlias = Literal["none", "cpu", "disk"]
EXACT: Final = 32  # bits: candidates are kept unquantized, in the model's dtype
FEWER: Final = (16, 8, 4, 2, 1)
BUFFER: Final = 32 << 20  # bytes per piece of a streamed matrix over all rows; there are two buffers of this size
FEW_ROWS: Final = 32  # as many are averaged anew in a CPU's memory; a mean of more keeps a running sum
LEAST: Final = 1 << 12  # minimum columns per piece, regardless of the number of rows
_SHARE: Final = 0.7  # fraction of free memory that "auto" bits may use; the rest is left for activations
_HOST: Final = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory needed for learning: the candidate matrix, the model and one gradient."""

    n: int  # number of candidates
    elements: int  # floating-point elements of the model that are mixed; tied tensors count once
    size: int  # of these elements, in bytes
    gradient: int  # size of the parameters among them, in bytes
    bits: int = EXACT  # per element of the matrix
    group_size: int  # elements that share a scale and a zero point if bits < 32
    offload: Offload  # where the matrix is kept instead of on the device
    device: torch.device  # of the model
    copied: int = 0  # bytes of the tensors that are copied, with their values in each candidate
    present: int = 0  # bytes of the model that are already allocated
    sharing: int = 1  # processes that share the host memory

    @classmethod
    def of(
        cls, model: nn.Module, n: int, *, bits: int | Literal["auto"], group_size: int, offload: Offload,
        device: torch.device, parts: int = 1, sharing: int = 1, copies: Copies | None = None,
    ) -> Self:  # fmt: skip
        """Plan for a model on its device, or for one of its ``parts`` shards; for ``bits`` see `at`."""
        every = [(names, tensor) for names, tensor in unique_tensors(model) if is_mixable(tensor)]
        values = [max((copies or {}).get(name, 0) for name in names) for names, _ in every]
        floats = [tensor for (_, tensor), count in zip(every, values, strict=True) if not count]
        copied = sum((1 + count) * tensor.nbytes for (_, tensor), count in zip(every, values, strict=True) if count)
        return cls(
            n=n,
            elements=sum(real_numel(tensor) for tensor in floats) // parts,
            size=sum(tensor.nbytes for tensor in floats) // parts,
            gradient=sum(tensor.nbytes for tensor in floats if isinstance(tensor, nn.Parameter)) // parts,
            group_size=group_size, offload=offload, device=device, copied=copied,
            present=sum(tensor.nbytes for _, tensor in every if not tensor.is_meta), sharing=sharing,
        ).at(bits)  # fmt: skip

    def at(self, bits: int | Literal["auto"]) -> Self:
        """Return the plan for ``bits``; "auto" is the most at which matrix and two vectors take 70 % of free memory."""
        if bits != "auto":
            return replace(self, bits=bits)
        free = free_memory(self.device) / (self.sharing if self.device.type == "cpu" else 1)
        plans = [replace(self, bits=bits) for bits in (EXACT, *FEWER)]
        return next((plan for plan in plans if plan.matrix <= _SHARE * free - 2 * self.size), plans[-1])

    @property
    def streamed(self) -> bool:
        """True if the matrix is kept off the device; offloading to "cpu" has no effect for a CPU model."""
        return self.offload == "disk" or (self.offload == "cpu" and self.device.type != "cpu")

    @property
    def matrix(self) -> int:
        """Bytes of the matrix on the device, with scales, zero points and mean; if streamed, of its two buffers."""
        if self.streamed:
            width = max(1, self.size // max(1, self.elements))
            return 2 * self.n * width * columns(self.n, self.elements, width)
        if self.bits == EXACT:
            return self.n * self.size
        return round(self.n * self.elements * (self.bits / 8 + 8 / self.group_size)) + 4 * self.elements

    @property
    def needed(self) -> int:
        """Total bytes needed on the device."""
        return self.matrix + self.size + self.gradient + self.copied

    @property
    def on_host(self) -> int:
        """Bytes needed in host memory when the device has its own memory."""
        return self.n * self.size if self.streamed and self.offload == "cpu" else 0

    @property
    def running_sum(self) -> int:
        """Bytes of host memory for a `ckptavg.candidates.running_sum.RunningSum`, which is not kept if they are short.

        It is allocated with streamed candidates, and else for the first mean of more than `FEW_ROWS` on a CPU.
        """
        return 8 * self.elements if self.streamed or (self.device.type == "cpu" and self.n > FEW_ROWS) else 0

    def __str__(self) -> str:
        """Format the breakdown as one line."""
        streamed = f" streamed ({self.offload})" if self.streamed else ""
        storage = f" at {self.bits} bits" if self.bits != EXACT else streamed
        parts = f"{counted(self.n, 'candidate')}{storage} {sized(self.matrix)} + model {sized(self.size)}"
        host = f", and {sized(self.on_host)} in the host's memory" if self.on_host else ""
        copied = f" + copied tensors {sized(self.copied)}" if self.copied else ""
        total = f"{parts} + gradient {sized(self.gradient)}{copied} = {sized(self.needed)} on {self.device}{host}"
        return f"{total}, and at most {sized(self.running_sum)} for a sum on the host" if self.running_sum else total

    def check(self) -> str:
        """Return breakdown and free memory as one line; raises OutOfMemoryError, which names settings that fit."""
        host = free_memory(_HOST) // self.sharing
        available = {self.device: self.present + host}  # the model already occupies its own
        if self.device.type != "cpu":
            available = {self.device: self.present + free_memory(self.device), _HOST: host}
        if self._fits(available):
            return f"memory: {self}; {sized(available[self.device])} free"
        free = " and ".join(f"{sized(size)} on {device}" for device, size in available.items())
        mildest = [
            next((f"{setting} ({sized(plan.needed)})" for setting, plan in plans if plan._fits(available)), None)
            for plans in self._smaller_plans()
        ]
        fitting = ", ".join(filter(None, mildest))
        hint = f"this would fit: {fitting}" if fitting else "no --bits, --offload or --last would fit"
        raise OutOfMemoryError(f"not enough memory: {self}, but only {free} is free", hint=hint)

    def _fits(self, available: dict[torch.device, int]) -> bool:
        return self.needed <= available[self.device] and self.on_host <= available.get(_HOST, 0)

    def _smaller_plans(self) -> list[list[tuple[str, Self]]]:
        """Return (setting, plan) pairs that need less memory, one list per option, mildest change first."""
        targets: tuple[Offload, ...] = ("disk",) if self.device.type == "cpu" else ("cpu", "disk")
        on_device = self.offload == "none"
        return [
            [(f"--bits {bits}", self.at(bits)) for bits in FEWER if on_device and bits < self.bits],
            [(f"--offload {to}", replace(self, bits=EXACT, offload=to)) for to in targets if to != self.offload],
            [(f"--last {n}", replace(self, n=n)) for n in range(self.n - 1, 1, -1)],
        ]


def columns(n: int, size: int, itemsize: int) -> int:
    """Return the number of columns per piece of a streamed matrix of N rows."""
    return max(1, min(size, max(LEAST, BUFFER // (n * itemsize))))


def free_memory(device: torch.device) -> int:
    """Return the free bytes on ``device``; on the host, at most what the limits of its control groups leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *map(_left, cgroups.groups("memory"))]
    if available := re.search(r"MemAvailable:\s*(\d+)", cgroups.read(Path("/proc/meminfo"))):
        limits.append(1024 * int(available[1]))
    return int(max(0, min(limits)))


def _left(group: Path) -> float:
    """Return the bytes that a control group may still use; its page cache, which grows as files are read, is free."""
    for limit, used, prefix in (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")):  # version 2, 1
        sizes = [cgroups.read(group / f"memory.{name}").strip() for name in (limit, used)]
        if all(map(str.isdecimal, sizes)):
            stat = cgroups.read(group / "memory.stat")
            cached = re.findall(rf"^{prefix}(?:in)?active_file (\d+)", stat, re.MULTILINE)
            return int(sizes[0]) - int(sizes[1]) + sum(map(int, cached))
    return math.inf


def sized(count: int) -> str:
    """Format a number of bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size / 10:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
