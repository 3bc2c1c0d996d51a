"""Settings of a draw that an output records in its metadata, as untrusted input."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from ckptavg.average.gaussian import Covariance, Gaussian, Noise
from ckptavg.average.noise import Deviations, drawn_names
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients

_ROUNDING: Final = 1e-12  # of coefficients; a normal quantile may differ by an ulp between machines
_KINDS: Final = {"scale": (int, float), "deviations": (int,), "covariance": (str,), "seed": (int,)}


@dataclass(frozen=True, kw_only=True)
class RecordedDraw:
    """A draw of `ckptavg.average.gaussian.Posterior`: its Gaussian, its number and the averaged tensors not drawn."""

    gaussian: Gaussian
    sample: int
    means: Sequence[str]

    def noise(self, checkpoints: Sequence[Checkpoint]) -> Noise:
        """Return the noise of the draw from these candidates."""
        return Noise(
            gaussian=self.gaussian, sample=self.sample, deviation=Deviations(checkpoints),
            names=drawn_names(checkpoints, self.means),
        )  # fmt: skip


def recorded_gaussian(settings: Mapping[str, Any], n: int) -> Gaussian:
    """Return the Gaussian over ``n`` candidates of these settings.

    Raises:
        ValueError: if a setting is missing, unknown or of a wrong type or value.
    """
    if wrong := sorted(_KINDS.keys() ^ settings.keys()):
        raise ValueError(f"settings.{wrong[0][:100]} is {'missing' if wrong[0] in _KINDS else 'no setting of a draw'}")
    allowed = {
        "scale": lambda value: 0 <= value < math.inf, "deviations": lambda value: value == 0 or 2 <= value <= n,
        "covariance": get_args(Covariance).__contains__, "seed": lambda value: True,
    }  # fmt: skip
    for name, value in settings.items():
        if type(value) not in _KINDS[name] or not allowed[name](value):
            raise ValueError(f"settings.{name} cannot be {str(value)[:80]}")
    return Gaussian(**settings)


def recorded_draw(settings: Mapping[str, Any], coefficients: Coefficients) -> RecordedDraw:
    """Return the draw of these settings.

    Raises:
        ValueError: as for `recorded_gaussian`, or if the coefficients are not those of the draw.
    """
    n, groups, sample = coefficients.n, coefficients.groups, settings.get("sample")
    gaussian = recorded_gaussian({name: value for name, value in settings.items() if name != "sample"}, n)
    if type(sample) is not int or sample < 1:
        raise ValueError(f"settings.sample cannot be {str(sample)[:80]}")
    if groups[0][:1] != ("",) or len(groups) > 2:
        raise ValueError("groups are not those of a draw")
    rows = zip(coefficients.values, gaussian.coefficients(n, sample, groups).values, strict=True)
    pairs = [pair for row, expected in rows for pair in zip(row, expected, strict=True)]
    if not all(math.isclose(a, b, abs_tol=_ROUNDING) for a, b in pairs):
        raise ValueError(f"the coefficients of {n} sources are not those of draw {sample} with its settings")
    return RecordedDraw(gaussian=gaussian, sample=sample, means=groups[1] if len(groups) > 1 else ())
