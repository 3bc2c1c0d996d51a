"""Results of a run as plain data; reports are built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from ckptavg.checkpoints.components import LeftOut
from ckptavg.coefficients import EVERYTHING, Groups
from ckptavg.cost import Cost
from ckptavg.errors import decimal
from ckptavg.report.digits import gain_places
from ckptavg.report.display import Report
from ckptavg.report.plane import Plane
from ckptavg.runtime import version
from ckptavg.score import Score, Split

if TYPE_CHECKING:
    from ckptavg.report.basin import Basins
    from ckptavg.surrogate import Surrogate

Row: TypeAlias = Mapping[str, float | str | None]


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """One candidate: its coefficient, and its score alone."""

    path: Path
    step: int
    coefficient: float | tuple[float, ...]
    score: Score | None = None
    columns: Row = field(default_factory=dict[str, float | str | None])


@dataclass(frozen=True, kw_only=True)
class Output:
    """The written file.

    Attributes:
        data_digest: digest of the tensors' bytes, which the file's own metadata record: of the data section behind the
            header; of several files, digest of the list of theirs; empty with ``--digests none``.
        sha256: SHA-256 of the whole file, as sha256sum prints it; of shards, that of their index; empty unless it was
            asked for with ``--digests sha256``.
        source_digests: file that was averaged → its digest; empty with ``--digests none``.
        not_averaged: tensors copied from the last selected candidate.
        recomputed: BatchNorm statistics, computed from data.
        derived: vectors of spectral norm, computed from the averaged weight.
        averaged_buffers: floating-point buffers that differ between candidates and were averaged.
    """

    path: Path
    data_digest: str = ""
    sha256: str = ""
    bytes: int
    dtype: str
    source_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    not_averaged: Sequence[str] = ()
    recomputed: Sequence[str] = ()
    derived: Sequence[str] = ()
    averaged_buffers: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class MatrixResult:
    """Candidate matrix used by the search.

    Attributes:
        bits: bits per element; 32 is the model's own dtype.
        group_size: elements that share a scale and a zero point, None without rounding.
        bytes: size on the device, scales included; with ``offload``, the size of the buffers.
        error: relative error that rounding causes in the candidates' differences from their mean.
        offload: ``cpu`` or ``disk`` if the matrix was stored there instead of on the device, else ``none``.
        precision: precision of the search's passes, ``float32`` for the model's own.
        compiled: whether the model's forward was compiled with torch.compile.
    """

    bits: int
    group_size: int | None
    bytes: int
    error: float
    offload: str = "none"
    precision: str = "float32"
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Difference of two scores in the units of the score; larger is better, losses are negated.

    Attributes:
        value: difference of the means.
        low, high: its 95 % interval; None if there is none, for ``reason``.
        units: number of ``unit``: examples, batches if the task gives means only, or groups of batches.
        paired: whether both scores saw the examples in the same order, so that differences could be taken.
        reason: why there is no interval.
        others: gains by the other metrics, by name.
    """

    value: float
    low: float | None = None
    high: float | None = None
    units: int = 0
    unit: str = "examples"
    paired: bool = True
    reason: str = ""
    others: Mapping[str, Gain] = field(default_factory=dict[str, "Gain"])

    @property
    def separated(self) -> bool:
        """True if the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        text = self.text(gain_places([self]))
        return f"{text} (no interval: {self.reason})" if self.low is None and self.reason else text

    def text(self, places: int) -> str:
        """Return the difference, with its interval if it has one, with this number of decimals."""
        value, low, high = (decimal(number, "+", places) for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]" if low and high else value


@dataclass(frozen=True, kw_only=True, repr=False)
class Result(Report):
    """Result of a run; its attributes are the keys of the JSON report.

    Attributes:
        scores: split → score of the written file.
        baselines: name → split → score; ``best`` is the best single candidate.
        verdict: summary of the scores in plain words.
        gains: baseline → gain of the written file over it on test data, which no choice depends on; in a comparison,
            other strategy → gain of the winner over it.
        worse: whether the selection scores below the best single candidate on validation.
        replaced: whether that candidate was written instead; ``baselines`` then includes the selection.
        groups: name prefixes of the tensors that each coefficient of a candidate applies to.
        tables: further tables of the strategy: title → rows, each column → value.
        next_steps: ``load``, Python code that loads the written file, and ``verify``, the command that verifies it.
        holdout: fraction of the validation data reserved for the test score, None if none was reserved.
        effective: effective number of candidates 1/Σβ²; None if a coefficient is negative.
        held_out: loss plus the optimism found by cross-validation, None if the strategy does not cross-validate.
    """

    kind: ClassVar[str] = "average"

    strategy: str
    settings: Mapping[str, Any]
    seed: int
    version: str = field(default_factory=version.own)
    candidates: Sequence[CandidateResult]
    left_out: Sequence[LeftOut] = ()
    scores: Mapping[Split, Score] = field(default_factory=dict[Split, Score])
    baselines: Mapping[str, Mapping[Split, Score]] = field(default_factory=dict[str, Mapping[Split, Score]])
    scored_on: Split = "val"
    groups: Groups = EVERYTHING
    holdout: float | None = None
    held_out: float | None = None
    effective: float | None = None
    best_step: int | None = None
    verdict: str = ""
    gains: Mapping[str, Gain] = field(default_factory=dict[str, Gain])
    worse: bool = False
    replaced: bool = False
    cost: Cost | None = None
    matrix: MatrixResult | None = None
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict[str, Sequence[Row]])
    trace: Mapping[str, Sequence[float | Sequence[float]]] = field(
        default_factory=dict[str, Sequence[float | Sequence[float]]]
    )
    warnings: Sequence[str] = ()
    output: Output | None = None
    next_steps: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class StrategyResult:
    """Result of one strategy of a comparison.

    Attributes:
        name: the requested spec, such as ``sewa:k=8``.
        used: number of candidates with a nonzero coefficient; ``effective`` as in `Result`.
        scores: split → score, with ``--write-all`` of the written file.
        over_last: split → gain over the last candidate.
        cost: cost as if the strategy had run alone.
        chose_on: the data of its last choice, on which its score is optimistic; None for a plain average.
        held_out: estimate of the loss on other data: `Result.held_out` of a strategy that cross-validates, the
            validation loss of a plain average, None for others.
        output: the file of ``--write-all``.
    """

    name: str
    strategy: str
    settings: Mapping[str, Any]
    coefficients: Sequence[float | tuple[float, ...]]
    groups: Groups
    used: int
    effective: float | None
    scores: Mapping[Split, Score]
    over_last: Mapping[Split, Gain]
    cost: Cost
    notes: Sequence[str] = ()
    chose_on: Split | None = None
    held_out: float | None = None
    output: Output | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """Result of the winner, and those of all strategies that finished.

    Attributes:
        selected_by: the figure that decided between the strategies; ``reason`` says why.
        unfinished: the strategies that were stopped, failed or did not run; ``warnings`` has the reasons.
    """

    kind: ClassVar[str] = "comparison"

    winner: str
    strategies: Sequence[StrategyResult]
    selected_by: Literal["held-out loss", "loss", "metric"] = "metric"
    reason: str = ""
    unfinished: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class Landscape(Report):
    """Loss around the candidates; see `ckptavg.pipeline.landscape.landscape`.

    Attributes:
        eigenvalues: eigenvalues of the quadratic's H, ascending.
        predicted, measured: losses of random mixtures, by the quadratic and by passes over the data.
        outputs: the written files: the numbers, the picture, or both.
    """

    kind: ClassVar[str] = "landscape"

    surrogate: Surrogate
    eigenvalues: Sequence[float]
    predicted: Sequence[float]
    measured: Sequence[float]
    spearman: float
    r_squared: float
    steps: Sequence[int]
    plane: Plane | None
    outputs: Sequence[Output] = ()
    left_out: Sequence[LeftOut] = ()
    warnings: Sequence[str] = ()

    @property
    def output(self) -> Output | None:
        """The first of the written files."""
        return self.outputs[0] if self.outputs else None


@dataclass(frozen=True, kw_only=True)
class FileScores:
    """The scores of one file, by split."""

    path: Path
    scores: Mapping[Split, Score]


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(Report):
    """Scores of files as they are; see `ckptavg.pipeline.evaluation.evaluate`."""

    kind: ClassVar[str] = "evaluation"

    files: Sequence[FileScores]


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection(Report):
    """The candidates in training order, and the files left out; see `ckptavg.checkpoints.inspection`.

    ``layout`` says what the directories are taken for, such as ``Accelerate save_state, 12 steps, component unet``;
    ``basin`` is what `ckptavg.pipeline.basin.find_basins` measured, if it was asked for.
    """

    kind: ClassVar[str] = "inspection"

    layout: str
    candidates: Sequence[Mapping[str, Any]]
    left_out: Sequence[LeftOut]
    warnings: Sequence[str]
    basin: Basins | None = None
