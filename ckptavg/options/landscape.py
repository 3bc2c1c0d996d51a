"""The options of a landscape: how many mixtures are measured, on how much data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from ckptavg.declaration import AT_LEAST_1, MAIN, SEARCH, Help, Limit, check
from ckptavg.errors import UsageError

_AT_LEAST_3: Final = Limit(lambda value: value >= 3, "at least 3")


@dataclass(frozen=True, kw_only=True)
class LandscapeOptions:
    """The options of a landscape."""

    mixtures: Annotated[Sequence[str] | str, Help(
        MAIN, "Draw the loss on the plane of three: last,swa,soup.",
        "Strategies as in compare; their averages span the plane.", "A,B,C")] = ""  # fmt: skip
    grid: Annotated[int, Help(
        MAIN, "Points along the plane's longer side.", "The same distance apart along the other one.", "N",
        limit=_AT_LEAST_3)] = 11  # fmt: skip
    examples: Annotated[int, Help(
        MAIN, "Validation examples per point of the plane.", "In whole batches, evenly spread over the data.", "N",
        limit=AT_LEAST_1)] = 512  # fmt: skip
    samples: Annotated[int, Help(
        MAIN, "Random mixtures that test the quadratic.", metavar="N", limit=_AT_LEAST_3)] = 32  # fmt: skip
    hessian: Annotated[
        Literal["auto", "exact", "gauss-newton"], Help(SEARCH, "Second derivatives of the quadratic.")
    ] = "auto"

    @property
    def names(self) -> list[str]:
        """The three strategies; empty if no plane is measured."""
        names = self.mixtures.split(",") if isinstance(self.mixtures, str) else self.mixtures
        return [name.strip() for name in names if name.strip()]

    def __post_init__(self) -> None:
        check(self)
        if len(self.names) not in (0, 3):
            hint = "--mixtures last,swa,soup"
            raise UsageError(
                f"--mixtures takes three strategies, whose plane is drawn, not {len(self.names)}", hint=hint
            )
