"""The options of a comparison: its strategies, what decides between them, and whether each is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ckptavg.declaration import MAIN, OUTPUT, Help, check


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """The options of a comparison."""

    strategies: Annotated[Sequence[str] | str, Help(
        MAIN, "Strategies, as last,sewa:k=8,twa:on=train:lr=0.01; default: all possible.", metavar="LIST"
    )] = ""  # fmt: skip
    select_by: Annotated[Literal["auto", "loss", "metric"], Help(
        MAIN, "What chooses the winner; auto is loss where both agree.",
        "They agree unless Spearman's correlation over scored mixtures is clearly below 0.3.")] = "auto"  # fmt: skip
    write_all: Annotated[Path | None, Help(
        OUTPUT, "Also write every strategy's average to this directory.", metavar="DIR")] = None  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
