"""Settings of a draw that an output records in its metadata, as untrusted input."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from ckptavg.average.gaussian import Covariance, Gaussian, Noise
from ckptavg.average.noise import Deviations, drawn_names
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import EVERYTHING, Coefficients

_ROUNDING: Final = 1e-12  # of coefficients; a normal quantile may differ by an ulp between machines


@dataclass(frozen=True, kw_only=True)
class RecordedDraw:
    """A draw of `ckptavg.average.gaussian.Posterior`: its Gaussian, its number and the tensors that are not drawn."""

    gaussian: Gaussian
    sample: int
    means: Sequence[str]

    def noise(self, checkpoints: Sequence[Checkpoint]) -> Noise:
        """Return the noise of the draw from these candidates."""
        return Noise(
            gaussian=self.gaussian, sample=self.sample, deviation=Deviations(checkpoints),
            names=drawn_names(checkpoints, self.means),
        )  # fmt: skip


def recorded_draw(settings: Mapping[str, Any], coefficients: Coefficients) -> RecordedDraw:
    """Return the draw of these settings.

    Raises:
        ValueError: if a setting is missing, unknown or of a wrong type, or the coefficients are not those of the draw.
    """
    kinds = {"scale": (int, float), "deviations": (int,), "covariance": (str,), "seed": (int,), "sample": (int,)}
    if wrong := sorted(kinds.keys() ^ settings.keys()):
        raise ValueError(f"settings.{wrong[0][:100]} is {'missing' if wrong[0] in kinds else 'no setting of a draw'}")
    n = coefficients.n
    allowed = {
        "scale": lambda value: 0 <= value < math.inf, "deviations": lambda value: value == 0 or 2 <= value <= n,
        "covariance": get_args(Covariance).__contains__, "seed": lambda value: True, "sample": lambda value: value >= 1,
    }  # fmt: skip
    for name, value in settings.items():
        if type(value) not in kinds[name] or not allowed[name](value):
            raise ValueError(f"settings.{name} cannot be {str(value)[:80]}")
    sample = settings["sample"]
    gaussian = Gaussian(**{name: value for name, value in settings.items() if name != "sample"})
    first, *means = coefficients.groups
    expected = gaussian.coefficients(n, sample, means[0] if means else ())
    rows = zip(coefficients.values, expected.values, strict=True) if coefficients.groups == expected.groups else ()
    equal = [math.isclose(a, b, abs_tol=_ROUNDING) for row, other in rows for a, b in zip(row, other, strict=True)]
    if (first,) != EVERYTHING or not equal or not all(equal):
        raise ValueError(f"the coefficients of {n} sources are not those of draw {sample} with its settings")
    return RecordedDraw(gaussian=gaussian, sample=sample, means=means[0] if means else ())
