"""What a run found, as plain data: the report is made from this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptavg.objective import Cost, Score, Split
from ckptavg.places import LeftOut


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """One candidate: what it was given, and how good it is alone."""

    path: Path
    step: int
    coefficient: float | tuple[float, ...]
    score: Score | None = None
    columns: Mapping[str, float] = field(default_factory=dict[str, float])


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
class Result:
    """A whole run.

    Attributes:
        scores: split → the score of the written file.
        baselines: name → split → score; ``best`` is the best single candidate.
        verdict: what the scores say, in plain words.
        worse: whether the selection scores below the best single candidate on validation.
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
    cost: Cost | None = None
    trace: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    warnings: Sequence[str] = ()
    output: Output | None = None
