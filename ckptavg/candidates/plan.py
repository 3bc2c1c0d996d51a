"""Estimate the memory that learning needs before it is allocated, and suggest settings that fit."""

from dataclasses import dataclass, replace
from typing import Final, Literal, Self, TypeAlias

import torch
from torch import nn

from ckptavg.candidates import budget
from ckptavg.candidates.flat import unique_tensors
from ckptavg.candidates.streamed import columns
from ckptavg.errors import OutOfMemoryError

Offload: TypeAlias = Literal["none", "cpu", "disk"]
EXACT: Final = 32  # bits: candidates are kept unquantized, in the model's dtype
FEWER: Final = (16, 8, 4, 2, 1)
_HOST: Final = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory needed for learning: the candidate matrix, the model and one gradient."""

    n: int  # number of candidates
    elements: int  # floating-point elements of the model; tied tensors count once
    size: int  # of these elements, in bytes
    gradient: int  # size of the parameters among them, in bytes
    bits: int  # per element of the matrix
    group_size: int  # elements that share a scale and a zero point if bits < 32
    offload: Offload  # where the matrix is kept instead of on the device
    device: torch.device  # of the model
    present: int = 0  # bytes of the model that are already allocated
    sharing: int = 1  # processes that share the host memory

    @classmethod
    def of(
        cls, model: nn.Module, n: int, *, bits: int | Literal["auto"], group_size: int, offload: Offload,
        device: torch.device, parts: int = 1, sharing: int = 1,
    ) -> Self:  # fmt: skip
        """Plan for a model on its device, or for one of its ``parts`` shards; "auto" selects the most bits that fit."""
        floats = [tensor for _, tensor in unique_tensors(model) if tensor.is_floating_point()]
        elements = sum(tensor.numel() for tensor in floats) // parts
        size = sum(tensor.nbytes for tensor in floats) // parts
        gradient = sum(tensor.nbytes for tensor in floats if isinstance(tensor, nn.Parameter)) // parts
        present = sum(tensor.nbytes for tensor in floats if not tensor.is_meta)
        if bits == "auto":
            bits = budget.largest(elements, size, n, group_size, device, (EXACT, *FEWER), sharing)
        return cls(
            n=n, elements=elements, size=size, gradient=gradient,
            bits=bits, group_size=group_size, offload=offload, device=device, present=present, sharing=sharing,
        )  # fmt: skip

    @property
    def streamed(self) -> bool:
        """True if the matrix is kept off the device; offloading to "cpu" has no effect for a CPU model."""
        return self.offload == "disk" or (self.offload == "cpu" and self.device.type != "cpu")

    @property
    def matrix(self) -> int:
        """Size of the matrix on the device in bytes; if streamed, of its two buffers."""
        if not self.streamed:
            return budget.matrix_bytes(self.elements, self.size, self.n, self.group_size, self.bits)
        width = max(1, self.size // max(1, self.elements))
        return 2 * self.n * width * columns(self.n, self.elements, width)

    @property
    def needed(self) -> int:
        """Total bytes needed on the device."""
        return self.matrix + self.size + self.gradient

    @property
    def on_host(self) -> int:
        """Bytes needed in host memory when the device has its own memory."""
        return self.n * self.size if self.streamed and self.offload == "cpu" else 0

    def __str__(self) -> str:
        """Format the breakdown as one line."""
        streamed = f" streamed ({self.offload})" if self.streamed else ""
        storage = f" at {self.bits} bits" if self.bits != EXACT else streamed
        parts = f"{self.n} candidates{storage} {sized(self.matrix)} + model {sized(self.size)}"
        host = f", and {sized(self.on_host)} in the host's memory" if self.on_host else ""
        return f"{parts} + gradient {sized(self.gradient)} = {sized(self.needed)} on {self.device}{host}"

    def check(self) -> str:
        """Return breakdown and free memory as one line; raises OutOfMemoryError, which names settings that fit."""
        host = budget.free_memory(_HOST) // self.sharing
        available = {self.device: self.present + host}  # the model already occupies its own
        if self.device.type != "cpu":
            available = {self.device: self.present + budget.free_memory(self.device), _HOST: host}
        if self._fits(available):
            return f"learning takes {self}; {sized(available[self.device])} free"
        free = " and ".join(f"{sized(size)} on {device}" for device, size in available.items())
        mildest = [
            next((f"{setting} ({sized(plan.needed)})" for setting, plan in plans if plan._fits(available)), None)
            for plans in self._smaller_plans()
        ]
        fitting = ", ".join(filter(None, mildest))
        raise OutOfMemoryError(
            f"learning takes {self}, but only {free} is free",
            hint=f"this would fit: {fitting}" if fitting else "no --bits, --offload or --last would fit",
        )

    def _fits(self, available: dict[torch.device, int]) -> bool:
        return self.needed <= available[self.device] and self.on_host <= available.get(_HOST, 0)

    def _smaller_plans(self) -> list[list[tuple[str, Self]]]:
        """Return (setting, plan) pairs that need less memory, one list per option, mildest change first."""
        targets: tuple[Offload, ...] = ("disk",) if self.device.type == "cpu" else ("cpu", "disk")
        on_device = self.offload == "none"
        return [
            [(f"--bits {bits}", replace(self, bits=bits)) for bits in FEWER if on_device and bits < self.bits],
            [(f"--offload {to}", replace(self, bits=EXACT, offload=to)) for to in targets if to != self.offload],
            [(f"--last {n}", replace(self, n=n)) for n in range(self.n - 1, 1, -1)],
        ]


def sized(count: int) -> str:
    """Format a number of bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size / 10:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
