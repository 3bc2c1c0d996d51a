"""The results of one training: a line of JSON, from which all tables can be rebuilt."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy on one training.

    Attributes:
        label: name in the tables.
        spec: specification given to ckptavg, or a description in words.
        used: number of candidates with a nonzero coefficient; a mean for rows that are means, None for other tools'.
        val_loss: loss on the data that strategies learn from; test_loss is on data that no strategy uses.
        figure: the domain's test figure, larger is better.
        also: further test figures by name.
        epochs: cost of the search in training epochs, None where it was not measured.
        seconds: likewise.
        rank: rank of a uniform average of K among all of them by validation loss, 1 is the best.
        chosen: the candidates of a uniform average; None for any other.
        negative: sum of the magnitudes of the negative coefficients.
    """

    label: str
    spec: str
    used: float | None
    val_loss: float
    test_loss: float
    figure: float
    epochs: float | None = None
    seconds: float | None = None
    rank: int | None = None
    chosen: Sequence[int] | None = None
    negative: float = 0.0
    also: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class Record:
    """One training: domain, seed and schedule.

    Attributes:
        digest: digest of the plan and the available strategies.
        plan: name of the plan.
        machine: versions and processors.
        n: number of candidates.
        k: number of candidates selected.
        subsets: number of subsets of that size.
        epochs: of the training; seconds likewise.
        rows: the strategies, a random choice and the best of all choices.
        sweep: SeWA and LAWA at other values of K, by ``label`` and ``used``.
        early: strategies on the first 60 % of the training.
        points: (validation loss, figure) of the single candidates and of random subsets.
        skipped: specifications that this version of ckptavg does not support.
        cpu_seconds: CPU time of the whole cell.
    """

    digest: str
    plan: str
    machine: str
    domain: str
    seed: int
    schedule: str
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
        """Return the key under which a training is computed only once."""
        return self.domain, self.seed, self.schedule

    def row(self, label: str, among: Sequence[Row] | None = None) -> Row | None:
        """Return the row with a label, or None."""
        return next((row for row in (self.rows if among is None else among) if row.label == label), None)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A training that could not be measured; the report names it, and the next run retries it."""

    digest: str
    domain: str
    seed: int
    schedule: str
    error: str

    @property
    def cell(self) -> tuple[str, int, str]:
        """Return the key of the failed training."""
        return self.domain, self.seed, self.schedule


def append(path: Path, result: Record | Failure) -> None:
    """Append one line; terminate a line that an interrupted run left incomplete first."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(asdict(result)) + "\n")


def read(path: Path) -> list[Record | Failure]:
    """Read all results, the last of each digest and cell; skip an incomplete line."""
    found: dict[tuple[str, ...], Record | Failure] = {}
    for line in _lines(path):
        try:
            stored = json.loads(line)
        except json.JSONDecodeError:
            continue
        result = Failure(**stored) if "error" in stored else _record(stored)
        key = result.digest, *map(str, result.cell)
        found.pop(key, None)  # in the order of the last lines
        found[key] = result
    return list(found.values())


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    stored = path.read_bytes()
    return (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode().splitlines()


def _record(stored: Mapping[str, Any]) -> Record:
    rows = {name: [Row(**row) for row in stored[name]] for name in ("rows", "sweep", "early")}
    points = [(loss, figure) for loss, figure in stored["points"]]
    return Record(**{**stored, **rows, "points": points})
