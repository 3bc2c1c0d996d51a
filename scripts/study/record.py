"""What one training told: a line of JSON, from which all tables can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study.plan import Schedule


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy on one training.

    Attributes:
        label: its name in the tables.
        spec: what ckptavg was asked for, or in words what was done.
        used: candidates with a coefficient other than 0; a mean for what is one.
        val_loss: on the data that strategies learn from; test_loss on data that none sees.
        figure: the domain's test figure, larger is better.
        epochs: cost of the search in training epochs, None where it was not measured.
        seconds: likewise.
        rank: of a uniform average of K among all such by validation loss, 1 is the best.
        coefficients: one a candidate.
    """

    label: str
    spec: str
    used: float
    val_loss: float
    test_loss: float
    figure: float
    epochs: float | None = None
    seconds: float | None = None
    rank: int | None = None
    coefficients: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """One training: domain, seed and schedule.

    Attributes:
        digest: of the plan and the strategies there were.
        plan: its name.
        machine: versions and processors.
        n: candidates.
        k: how many are chosen of them.
        subsets: how many ways there are.
        epochs: of the training; seconds likewise.
        rows: the strategies, and what random and the best of all choices would give.
        sweep: SeWA and LAWA at other numbers, by ``label``, with ``used`` of them.
        early: strategies on the first 60 % of the training.
        points: (validation loss, figure) of the single candidates and of random subsets.
        skipped: specifications that this version of ckptavg does not know.
        cpu_seconds: that the whole cell took.
    """

    digest: str
    plan: str
    machine: str
    domain: str
    seed: int
    schedule: Schedule
    n: int
    k: int
    subsets: int
    epochs: float
    seconds: float
    rows: Sequence[Row]
    sweep: Sequence[Row]
    early: Sequence[Row]
    points: Sequence[tuple[float, float]]
    skipped: Sequence[str]
    cpu_seconds: float

    @property
    def cell(self) -> tuple[str, int, str]:
        """What is not computed twice."""
        return self.domain, self.seed, self.schedule

    def row(self, label: str, among: Sequence[Row] | None = None) -> Row | None:
        """The row with a label, if there is one."""
        return next((row for row in (self.rows if among is None else among) if row.label == label), None)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A training that could not be measured; the report names it, and the next run tries again."""

    digest: str
    domain: str
    seed: int
    schedule: Schedule
    error: str

    @property
    def cell(self) -> tuple[str, int, str]:
        """What failed."""
        return self.domain, self.seed, self.schedule


def append(path: Path, result: Record | Failure) -> None:
    """Add one line; a line that an interrupted run left half-written is ended first."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(asdict(result)) + "\n")


def read(path: Path) -> list[Record | Failure]:
    """All that was measured, the last of each digest and cell; half a line is passed over."""
    found: dict[tuple[str, ...], Record | Failure] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            stored = json.loads(line)
        except json.JSONDecodeError:
            continue
        result = Failure(**stored) if "error" in stored else _record(stored)
        key = result.digest, *map(str, result.cell)
        found.pop(key, None)  # the order is that of the last lines
        found[key] = result
    return list(found.values())


def _record(stored: Mapping[str, Any]) -> Record:
    rows = {name: [Row(**row) for row in stored[name]] for name in ("rows", "sweep", "early")}
    points = [(loss, figure) for loss, figure in stored["points"]]
    return Record(**{**stored, **rows, "points": points})
