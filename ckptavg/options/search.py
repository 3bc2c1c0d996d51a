"""The options of a search: where the candidates are kept, and how the model runs."""

from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias

from ckptavg.declaration import AT_LEAST_1, MAIN, SEARCH, WORKERS, Help, Limit, check
from ckptavg.errors import UsageError

Bits: TypeAlias = Literal[32, 16, 8, 4, 2, 1, "auto"]
Offload: TypeAlias = Literal["none", "cpu", "disk"]
Parallel: TypeAlias = Literal["auto", "batches", "candidates"]
Precision: TypeAlias = Literal["float32", "bfloat16", "auto"]
# torch takes 64 bits, and each pass over the data uses its own seed above this one
_SEEDS: Final = Limit(lambda value: abs(value) < 2**62, "between -2^62 and 2^62")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of a search. The average that is written is exact, whatever they are."""

    device: Annotated[
        str, Help(MAIN, "auto, cpu, cuda, cuda:1 or mps.", metavar="DEVICE", changes_measurements=False)
    ] = "auto"  # the hardware's name is compared instead
    seed: Annotated[int, Help(SEARCH, "Seed of all random numbers.", metavar="N", limit=_SEEDS)] = 0
    deterministic: Annotated[
        bool, Help(SEARCH, "Use deterministic algorithms; may be slower.", "torch's results repeat to the bit.")
    ] = False
    bits: Annotated[Bits, Help(SEARCH, "Bits per candidate weight.", "auto takes the most that fit the device.")] = 32
    group_size: Annotated[int, Help(
        SEARCH, "Weights per scale below 32 bits.", "A group also shares a zero point.", "N", limit=AT_LEAST_1
    )] = 128  # fmt: skip
    offload: Annotated[Offload, Help(
        SEARCH, "Keep candidates off the device.", "In host memory (cpu) or in the checkpoint files (disk)."
    )] = "none"  # fmt: skip
    precision: Annotated[Precision, Help(
        SEARCH, "Autocast for search passes.",
        "float32 keeps the model's own precision; auto is bfloat16 where a GPU supports it.", changes_measurements=False
    )] = "float32"  # the precision that it stands for on the device is compared instead  # fmt: skip
    compile: Annotated[bool, Help(SEARCH, "Use torch.compile; pays in long searches.")] = False
    parallel: Annotated[Parallel, Help(
        WORKERS, "What ranks divide in a score.", "auto is candidates if several are scored at once, else batches.",
        changes_measurements=False)] = "auto"  # fmt: skip
    shard: Annotated[bool, Help(
        WORKERS, "Shard a model that fits no single device.",
        "The model and the candidates are divided over the processes (FSDP2).")] = False  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.offload != "none" and self.bits != 32:
            both = f"--offload keeps the candidates in full precision, --bits {self.bits} in fewer bits"
            raise UsageError(f"{both}: give only one")
        if self.shard and (self.compile or self.precision != "float32"):
            unused = "--compile" if self.compile else f"--precision {self.precision}"
            raise UsageError(f"--shard is not supported with {unused}")
