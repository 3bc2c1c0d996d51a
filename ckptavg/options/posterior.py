"""The options of ``swag``: the Gaussian over the candidates, and what is drawn from it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from ckptavg.declaration import AT_LEAST_1, MAIN, Help, Limit, check
from ckptavg.errors import UsageError

DRAWS: Final = 30
DEVIATIONS: Final = 20
SCALES: Final = (0.0, 0.25, 0.5, 1.0)
"""The scales that ``--scale auto`` tries."""
_NATURAL: Final = Limit(lambda value: value >= 0, "0 or more")
_RANK: Final = Limit(lambda value: value == 0 or value >= 2, "0 (only the diagonal), or at least 2")
_SCALE: Final = Limit(lambda value: value == "auto" or 0 <= value < math.inf, "auto, or 0 or more")


@dataclass(frozen=True, kw_only=True)
class PosteriorOptions:
    """The options of ``swag``."""

    samples: Annotated[int | None, Help(
        MAIN, "Also write N models drawn at random, in -o DIR/.", "They are DIR/sample-1/ and so on.", "N",
        limit=AT_LEAST_1)] = None  # fmt: skip
    posterior: Annotated[Path | str | None, Help(
        MAIN, "Also write mean and deviations to this file.",
        "--from reads it. In -o DIR/ it has the configuration of the draws beside it.", "FILE")] = None  # fmt: skip
    from_: Annotated[Path | str | None, Help(
        MAIN, "Draw from a file of --posterior, without CKPTS.", metavar="FILE")] = None  # fmt: skip
    draws: Annotated[int | None, Help(
        MAIN, "Score the average of N models; default those of --samples, or 30.",
        "It needs a task. 0 scores the mean alone.", "N", limit=_NATURAL)] = None  # fmt: skip
    scale: Annotated[float | Literal["auto"] | None, Help(
        MAIN, "Factor of the covariance; default 0.5, or 1 without deviations.",
        "0 is the mean; auto takes the one of 0, 0.25, 0.5 and 1 with the lowest NLL on validation data.",
        limit=_SCALE)] = None  # fmt: skip
    deviations: Annotated[int | None, Help(
        MAIN, "Candidates whose deviations are kept, the last ones; default 20.",
        "0 is SWAG-Diagonal: each weight varies by itself.", "K", limit=_RANK)] = None  # fmt: skip
    covariance: Annotated[Literal["running", "sample"], Help(
        MAIN, "Deviations from the mean so far, or of all.",
        "running is the authors'; sample does not depend on the order of the candidates.")] = "running"  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        for name in ("posterior", "from_"):
            if getattr(self, name) is not None and not str(getattr(self, name)):
                raise UsageError(f"--{name.rstrip('_')} is empty: name a file")
        if self.posterior is not None and Path(self.posterior).suffix != ".safetensors":
            hint = f"--posterior {Path(self.posterior).with_suffix('.safetensors')}"
            raise UsageError(f"--posterior {self.posterior}: a safetensors file is written", hint=hint)
        if self.from_ is None:
            return
        if self.samples is None:
            raise UsageError("--from draws models from a file, so it needs --samples N and -o DIR/")
        given = {
            "draws": self.draws, "posterior": self.posterior, "deviations": self.deviations,
            "covariance": None if self.covariance == "running" else self.covariance,
            "scale auto": "auto" if self.scale == "auto" else None,
        }  # fmt: skip
        if unused := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"--{unused[0]} has no use with --from, whose file has the Gaussian", hint="leave it out")
