"""SWAG's Gaussian over the candidates: the low-rank part of a draw as coefficients, the diagonal part as noise.

Shape suffixes: N = candidates, K = kept deviations, C = consecutive elements of a tensor.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptavg.average.noise import Deviation, Deviations, drawn_names, not_drawn, standard_normal, stream_key
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.runtime.workers import Workers

Covariance: TypeAlias = Literal["running", "sample"]


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """The normal distribution N(w̄, c·(Σ_diag + D̂ D̂ᵀ/(K − 1))) of Maddox et al., fitted to N candidates w_i.

    w̄ = Σ_i w_i/N and Σ_diag = diag(Σ_i (w_i − w̄)²/N). The columns of D̂ are the deviations of the last K candidates:
    d_i = w_i − (w_1 + … + w_i)/i, the authors' (``running``), or d_i = w_i − w̄ (``sample``), for which the order of
    the candidates does not matter and K = N gives the sample covariance. A draw is

        w = w̄ + √(c/(K − 1)) Σ_k z_k d_k + √c σ ⊙ z,    z_k and the elements of z standard normal.

    Without the last term it is Σ_j β_j w_j with Σ_j β_j = 1: `coefficients`. The paper's posterior is c = 1/2, and
    c = 1 that of SWAG-Diagonal (K = 0).

    Attributes:
        scale: c.
        deviations: K, from 2 to N; 0 leaves the second term out.
        covariance: which deviations.
        seed: the seed of all draws.
    References:
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning, arXiv:1902.02476, section 3.
        Differs from the authors' code, which subtracts E[w]² from E[w²] in float32 and divides by the K that was asked
        for minus 1 even where fewer deviations were collected.
    """

    scale: float
    deviations: int
    covariance: Covariance
    seed: int

    def rows(self, n: int) -> list[list[float]]:
        """Return [K, N], each deviation d_k as coefficients of the candidates; a row sums to 0."""
        rows: list[list[float]] = []
        for i in range(n - self.deviations, n):
            count = i + 1 if self.covariance == "running" else n
            rows.append([(j == i) - (j < count) / count for j in range(n)])
        return rows

    def steps(self, sample: int) -> list[float]:
        """Return [K], √(c/(K − 1)) z_k of a draw."""
        z_K = standard_normal(stream_key(self.seed, sample), 0, self.deviations)
        return [math.sqrt(self.scale / (self.deviations - 1)) * float(z) for z in z_K]

    def coefficients(self, n: int, sample: int, groups: Groups = EVERYTHING) -> Coefficients:
        """Return β of a draw, without the noise of the diagonal; the tensors of a second group are those of w̄."""
        terms = list(zip(self.steps(sample), self.rows(n), strict=True)) if self.deviations and self.scale else []
        uniform = (1 / n,) * n
        drawn = tuple(math.fsum([1 / n, *(step * row[j] for step, row in terms)]) for j in range(n))
        return Coefficients((drawn, uniform)[: len(groups)], groups)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise √c σ ⊙ z of one draw, a function of the seed, the draw's number and the tensor's name alone.

    Attributes:
        gaussian: the settings; scale and seed are used.
        sample: the number of the draw, from 1.
        deviation: σ.
        names: name of each tensor that has noise → the name that its noise is drawn under; one for tied tensors.
    """

    gaussian: Gaussian
    sample: int
    deviation: Deviation
    names: Mapping[str, str]

    def __call__(self, name: str, start: int, count: int) -> NDArray[np.float64] | None:
        """Return [C] float64, the noise of the elements of a tensor from ``start`` on; None if it has none."""
        if name not in self.names or self.gaussian.scale == 0:
            return None
        deviation_C = self.deviation(name, start, count)
        if not deviation_C.any():
            return None
        z_C = standard_normal(stream_key(self.gaussian.seed, self.sample, self.names[name]), start, count)
        z_C *= deviation_C
        z_C *= math.sqrt(self.gaussian.scale)
        return z_C


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One model drawn from a `Gaussian`: coefficients of the candidates, and noise."""

    gaussian: Gaussian
    sample: int
    coefficients: Coefficients
    noise: Noise

    @property
    def settings(self) -> dict[str, Any]:
        """The entries of an output's metadata that, with its sources, give the draw."""
        return {**asdict(self.gaussian), "sample": self.sample}


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """A `Gaussian` over open candidates.

    Attributes:
        gaussian: its settings.
        checkpoints: the N candidates, in training order.
        deviation: their σ.
        groups: name prefixes of the tensors that are drawn, and of the averaged ones that are not, if there are any.
        names: see `Noise.names`.
    """

    gaussian: Gaussian
    checkpoints: Sequence[Checkpoint]
    deviation: Deviations
    groups: Groups
    names: Mapping[str, str]

    @classmethod
    def over(cls, checkpoints: Sequence[Checkpoint], gaussian: Gaussian, buffers: Collection[str] = ()) -> "Posterior":
        """Return the posterior; BatchNorm's statistics, and ``buffers`` of the model, are not drawn."""
        means = not_drawn(checkpoints[0], buffers)
        names = drawn_names(checkpoints, means)
        inside = [name for name in names if name.startswith(tuple(means))]  # a group covers what begins with a name
        return cls(
            gaussian=gaussian, checkpoints=checkpoints, deviation=Deviations(checkpoints), names=names,
            groups=(("", *inside), tuple(means)) if means else EVERYTHING,
        )  # fmt: skip

    def draw(self, sample: int) -> Draw:
        """Return draw number ``sample``, from 1."""
        noise = Noise(gaussian=self.gaussian, sample=sample, deviation=self.deviation, names=self.names)
        coefficients = self.gaussian.coefficients(len(self.checkpoints), sample, self.groups)
        return Draw(gaussian=self.gaussian, sample=sample, coefficients=coefficients, noise=noise)

    def spread(self, workers: Workers) -> float | None:
        """Return ‖σ‖/‖w̄‖ over the tensors that have been drawn by all ranks; None if none has."""
        deviation, mean = map(math.fsum, zip(*workers.gather(self.deviation.squares), strict=True))
        return math.sqrt(deviation / mean) if mean else None
