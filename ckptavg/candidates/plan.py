"""What learning takes of the device's memory: said before it is taken, and what would fit where it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import torch
from torch import nn

from ckptavg.candidates import budget
from ckptavg.candidates.flat import unique_tensors
from ckptavg.candidates.streamed import columns
from ckptavg.errors import OutOfMemoryError

Offload: TypeAlias = Literal["none", "cpu", "disk"]
EXACT: Final = 32  # bits: the candidates as they are, in the model's own dtype
FEWER: Final = (16, 8, 4, 2, 1)
_HOST: Final = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory of learning: the candidate matrix, the model and one gradient.

    Attributes:
        n: the number of candidates.
        elements: the model's floating-point ones, tied ones once.
        size: their bytes.
        gradient: the bytes of the parameters among them.
        bits: of an element of the matrix.
        group_size: elements that share a scale and a zero point where ``bits`` < 32.
        offload: where the matrix lies instead of on the device.
        device: where the model is.
        present: bytes of the model that are there already.
        sharing: how many processes share the host's memory.
    """

    n: int
    elements: int
    size: int
    gradient: int
    bits: int
    group_size: int
    offload: Offload
    device: torch.device
    present: int = 0
    sharing: int = 1

    @classmethod
    def of(
        cls, model: nn.Module, n: int, *, bits: int | Literal["auto"], group_size: int, offload: Offload,
        device: torch.device, parts: int = 1, sharing: int = 1,
    ) -> Plan:  # fmt: skip
        """The plan for a model on its device, or for one of ``parts`` of it; ``auto`` bits are the most that fit."""
        floats = [tensor for _, tensor in unique_tensors(model) if tensor.is_floating_point()]
        elements, size = sum(tensor.numel() for tensor in floats), sum(tensor.nbytes for tensor in floats)
        gradient = sum(tensor.nbytes for tensor in floats if isinstance(tensor, nn.Parameter))
        present = sum(tensor.nbytes for tensor in floats if not tensor.is_meta)
        elements, size, gradient = elements // parts, size // parts, gradient // parts
        if bits == "auto":
            bits = budget.largest(elements, size, n, group_size, device, (EXACT, *FEWER), sharing)
        return cls(
            n=n, elements=elements, size=size, gradient=gradient,
            bits=bits, group_size=group_size, offload=offload, device=device, present=present, sharing=sharing,
        )  # fmt: skip

    @property
    def streamed(self) -> bool:
        """Whether the matrix lies elsewhere; in the host's memory a CPU has it already."""
        return self.offload == "disk" or (self.offload == "cpu" and self.device.type != "cpu")

    @property
    def matrix(self) -> int:
        """The bytes of the matrix on the device; where it is streamed, of its two buffers."""
        if not self.streamed:
            return budget.matrix_bytes(self.elements, self.size, self.n, self.group_size, self.bits)
        width = max(1, self.size // max(1, self.elements))
        return 2 * self.n * width * columns(self.n, self.elements, width)

    @property
    def needed(self) -> int:
        """The bytes on the device."""
        return self.matrix + self.size + self.gradient

    @property
    def on_host(self) -> int:
        """The bytes in the host's memory beside a device that has its own."""
        return self.n * self.size if self.streamed and self.offload == "cpu" else 0

    def __str__(self) -> str:
        """What it is made of, in one line."""
        how = f" at {self.bits} bits" if self.bits != EXACT else f" streamed ({self.offload})" if self.streamed else ""
        parts = f"{self.n} candidates{how} {sized(self.matrix)} + model {sized(self.size)}"
        beside = f", and {sized(self.on_host)} in the host's memory" if self.on_host else ""
        return f"{parts} + gradient {sized(self.gradient)} = {sized(self.needed)} on {self.device}{beside}"

    def check(self) -> str:
        """This line and the memory that there is for it.

        Raises:
            OutOfMemoryError: if it is too little, with the settings that would fit.
        """
        room = self._room()
        if self._fits(room):
            return f"learning takes {self}; {sized(room[self.device])} free"
        there = " and ".join(f"{sized(free)} on {place}" for place, free in room.items())
        mildest = [
            next(((setting, other) for setting, other in kind if other._fits(room)), None) for kind in self._less()
        ]
        fitting = [f"{one[0]} ({sized(one[1].needed)})" for one in mildest if one]
        raise OutOfMemoryError(
            f"learning takes {self}, but there are {there}",
            hint=f"this would fit: {', '.join(fitting)}" if fitting else "no --bits, --offload or --last would fit",
        )

    def _room(self) -> dict[torch.device, int]:
        """Device → bytes that can be had there, those of the model that is there included."""
        host = budget.free_memory(_HOST) // self.sharing
        if self.device.type == "cpu":
            return {self.device: host + self.present}
        return {self.device: budget.free_memory(self.device) + self.present, _HOST: host}

    def _fits(self, room: dict[torch.device, int]) -> bool:
        return self.needed <= room[self.device] and self.on_host <= room.get(_HOST, 0)

    def _less(self) -> list[list[tuple[str, Plan]]]:
        """Kinds of settings that take less, each from the mildest on."""
        places: tuple[Offload, ...] = ("disk",) if self.device.type == "cpu" else ("cpu", "disk")
        kept = self.offload == "none"
        return [
            [(f"--bits {bits}", replace(self, bits=bits)) for bits in FEWER if kept and bits < self.bits],
            [(f"--offload {to}", replace(self, bits=EXACT, offload=to)) for to in places if to != self.offload],
            [(f"--last {n}", replace(self, n=n)) for n in range(self.n - 1, 1, -1)],
        ]


def sized(count: int) -> str:
    """A number of bytes for a reader."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size / 10:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
