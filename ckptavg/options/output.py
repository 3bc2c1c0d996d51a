"""The options of the output: its place, its form, and what may replace it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from ckptavg.declaration import AT_LEAST_1, MAIN, OUTPUT, RUN, Help, check
from ckptavg.errors import UsageError
from ckptavg.filesystem.digest import Algorithm
from ckptavg.output.destination import destination

Dtype: TypeAlias = Literal["float64", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The options of the output."""

    output: Annotated[Path | str, Help(
        MAIN, "File to write; a directory/ gets what its loader reads.",
        "A path that ends in / and an existing directory are directories.", "PATH", "-o", changes_measurements=False
    )] = "averaged.safetensors"  # the journal lies beside it  # fmt: skip
    force: Annotated[bool, Help(MAIN, "Replace an existing output or report.", changes_measurements=False)] = False
    never_worse: Annotated[bool, Help(
        OUTPUT, "Write the best single checkpoint if it scores higher.", "Not in compare.", changes_measurements=False
    )] = False  # fmt: skip
    dtype: Annotated[Dtype | None, Help(
        OUTPUT, "Dtype of the output; default as stored.", "With it, candidates may differ in theirs."
    )] = None  # fmt: skip
    keep: Annotated[Sequence[str], Help(
        OUTPUT, "Copy tensors whose names match this glob.",
        "From the last selected checkpoint, instead of averaging; may be repeated.",
        "PATTERN")] = ()  # fmt: skip
    average: Annotated[Sequence[str], Help(
        OUTPUT, "Average tensors that --keep would copy.",
        "Those whose names match this glob, also if they are functions of others; may be repeated.",
        "PATTERN")] = ()  # fmt: skip
    max_shard_size: Annotated[str | None, Help(
        OUTPUT, "In a directory: files of at most SIZE, such as 5GB.", "An index lists them.", "SIZE",
        changes_measurements=False)] = None  # fmt: skip
    format: Annotated[Literal["safetensors", "dcp"], Help(
        OUTPUT, "dcp: FSDP can resume training from it.", "This is torch.distributed.checkpoint.",
        changes_measurements=False)] = "safetensors"  # fmt: skip
    adapter: Annotated[Literal["factors", "exact"], Help(
        OUTPUT, "Average PEFT factors (approximate) or exact weights.")] = "factors"  # fmt: skip
    rank: Annotated[int | None, Help(
        OUTPUT, "Reduce the adapter of --adapter exact to rank N.", "Else it is the sum of the candidates' ranks.", "N",
        limit=AT_LEAST_1)] = None  # fmt: skip
    digests: Annotated[Literal["blake3", "sha256", "none"], Help(
        RUN, "Digests of the sources and of the output.",
        "They go into the metadata. With sha256, which is slower, the report has what sha256sum prints of the output. "
        "A source that has a SHA-256 already, in SHA256SUMS or as its name in a Hugging Face cache, keeps it.",
        changes_measurements=False)] = "blake3"  # fmt: skip

    @property
    def algorithm(self) -> Algorithm | None:
        """Return the algorithm of ``--digests``; None without digests."""
        return None if self.digests == "none" else self.digests

    @property
    def destination(self) -> tuple[Path, Path | None]:
        """Return the result of `destination`, or the output path itself with ``--format dcp``."""
        return (Path(self.output), None) if self.format == "dcp" else destination(self.output)

    def __post_init__(self) -> None:
        check(self)
        if not str(self.output):
            raise UsageError("--output is empty: name a file or a directory")
        if self.adapter == "exact" and (self.keep or self.average):
            raise UsageError("--keep and --average do not go with --adapter exact, which averages what adapters do")
        if self.rank is not None and self.adapter != "exact":
            raise UsageError("--rank goes with --adapter exact")
        if self.max_shard_size is not None and self.destination[1] is None:
            raise UsageError("--max-shard-size needs a directory for its files", hint="end --output with a /")
