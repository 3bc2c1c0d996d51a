"""What a run found, as plain data: the report is made from this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg.checkpoints.listing import LeftOut
from ckptavg.coefficients import EVERYTHING, Groups
from ckptavg.cost import Cost
from ckptavg.score import Score, Split

if TYPE_CHECKING:
    from ckptavg.surrogate import Surrogate


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """One candidate: what it was given, and how good it is alone."""

    path: Path
    step: int
    coefficient: float | tuple[float, ...]
    score: Score | None = None
    columns: Mapping[str, float | str | None] = field(default_factory=dict[str, float | str | None])


@dataclass(frozen=True, kw_only=True)
class Output:
    """The file that was written."""

    path: Path
    sha256: str
    bytes: int
    dtype: str
    not_averaged: Sequence[str] = ()
    recomputed: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class MatrixResult:
    """The candidate matrix that was searched.

    Attributes:
        bits: of an element; 32 is the candidates as the model holds them.
        group_size: elements that share a scale and a zero point, None where nothing was rounded.
        bytes: it took on the device, scales included.
        error: what rounding lost of the candidates' differences from their mean, relative to these.
        offload: where it lay instead: ``cpu`` or ``disk``; then ``bytes`` are those of the buffers.
        precision: of the passes of the search, ``float32`` for the model's own.
        compiled: whether torch.compile had the model's forward.
    """

    bits: int
    group_size: int | None
    bytes: int
    error: float
    offload: str = "none"
    precision: str = "float32"
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """A whole run.

    Attributes:
        scores: split → the score of the written file.
        baselines: name → split → score; ``best`` is the best single candidate.
        verdict: what the scores say, in plain words.
        worse: whether the selection scores below the best single candidate on validation.
        replaced: whether that candidate was written instead; then the selection is among the baselines.
        groups: the tensors that each of a candidate's coefficients is for, as prefixes of their names.
        tables: further tables of the strategy: title → rows, each column → value.
        holdout: the fraction of the validation data that was kept for the test score, None where there was no need.
    """

    strategy: str
    settings: Mapping[str, Any]
    seed: int
    candidates: Sequence[CandidateResult]
    left_out: Sequence[LeftOut] = ()
    scores: Mapping[Split, Score] = field(default_factory=dict[Split, Score])
    baselines: Mapping[str, Mapping[Split, Score]] = field(default_factory=dict[str, Mapping[Split, Score]])
    best_step: int | None = None
    scored_on: Split = "val"
    verdict: str = ""
    worse: bool = False
    replaced: bool = False
    groups: Groups = EVERYTHING
    holdout: float | None = None
    matrix: MatrixResult | None = None
    cost: Cost | None = None
    tables: Mapping[str, Sequence[Mapping[str, float | str | None]]] = field(
        default_factory=dict[str, Sequence[Mapping[str, float | str | None]]]
    )
    trace: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    warnings: Sequence[str] = ()
    output: Output | None = None


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How much better one score is than another, in its own units: larger is better, a loss is counted negative.

    Attributes:
        value: the difference of the means.
        low: the lower end of its paired-bootstrap 95 % interval, None where there is nothing to resample.
        high: the upper end.
        units: how many examples (or batches, where the task gives means only) were resampled.
        paired: whether the examples came in the same order for both, so that differences could be resampled.
    """

    value: float
    low: float | None
    high: float | None
    units: int
    paired: bool = True

    @property
    def separated(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class StrategyResult:
    """One strategy of a comparison.

    Attributes:
        name: as it was asked for, such as ``sewa:k=8``.
        used: how many candidates have a coefficient other than 0.
        gains: split → how much better than the last candidate.
        cost: as if it had run alone.
    """

    name: str
    strategy: str
    settings: Mapping[str, Any]
    coefficients: Sequence[float | tuple[float, ...]]
    groups: Groups
    used: int
    scores: Mapping[Split, Score]
    gains: Mapping[Split, Gain]
    cost: Cost
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several strategies on the same candidates.

    Attributes:
        winner: the name of the one with the highest validation score.
        result: the winner's run.
    """

    contestants: Sequence[StrategyResult]
    winner: str
    result: Result


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Real losses on the plane through three mixtures a, b, c: a + u(b − a) + v(c − a).

    Attributes:
        names: of the three.
        u: the values of u, along columns.
        v: the values of v, along rows.
        losses: a row for each v.
    """

    names: tuple[str, str, str]
    u: Sequence[float]
    v: Sequence[float]
    losses: Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """The loss around the candidates; see `ckptavg.pipeline.landscape.landscape`.

    Attributes:
        eigenvalues: of the quadratic's H, from the smallest up.
        predicted: by the quadratic, the losses of random mixtures.
        measured: what they really are.
    """

    surrogate: Surrogate
    eigenvalues: Sequence[float]
    predicted: Sequence[float]
    measured: Sequence[float]
    spearman: float
    r_squared: float
    steps: Sequence[int]
    plane: Plane | None
    output: Output | None = None
    left_out: Sequence[LeftOut] = ()
    warnings: Sequence[str] = ()
