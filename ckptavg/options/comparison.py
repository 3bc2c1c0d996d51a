"""The options of a comparison: its strategies, what decides between them, and whether each is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ckptavg.declaration import MAIN, OUTPUT, Help, check
from ckptavg.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """The options of a comparison."""

    strategies: Annotated[Sequence[str] | str, Help(
        MAIN, "Strategies, as last,sewa:k=8,twa:on=train; default: all possible but blend.", metavar="LIST"
    )] = ""  # fmt: skip
    select_by: Annotated[Literal["auto", "loss", "metric"], Help(
        MAIN, "What chooses the winner; auto is loss where both agree.",
        "They agree unless Spearman's correlation is clearly below 0.3, or the best metric is above "
        "that of the lowest loss by four standard errors.")] = "auto"  # fmt: skip
    write_all: Annotated[Path | str | None, Help(
        OUTPUT, "Also write every strategy's average to this directory.", metavar="DIR")] = None  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.write_all is not None and not str(self.write_all):
            raise UsageError("--write-all is empty: name a directory")
