"""All seeds of one domain and schedule, and the statistics that the tables show."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from scipy.stats import rankdata, spearmanr

from study.domains import domain
from study.interval import FEWEST, Interval
from study.job import Domain
from study.record import Record, Row

ORDERED: Final = {"last", "LAWA", "EMA 0.9", "EMA 0.5", "WSM sqrt", "WSM cosine", "blend"}
"""Strategies that need candidates in an order."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Trainings that differ only in their seed.

    Attributes:
        name: name of the domain.
        schedule: learning-rate schedule.
        records: one per seed.
    """

    name: str
    schedule: str
    records: Sequence[Record]

    @property
    def domain(self) -> Domain:
        """Return the domain of the trainings."""
        return domain(self.name)

    @property
    def title(self) -> str:
        """Return the heading of a row."""
        return f"{self.name}, {self.schedule}"

    @property
    def labels(self) -> list[str]:
        """Return the labels of the rows, in their order."""
        return list(dict.fromkeys(row.label for record in self.records for row in record.rows))

    @property
    def peers(self) -> list[str]:
        """Return the labels of the averages that other tools made."""
        return [label for label in self.labels if all(row.used is None for row in self.rows(label))]

    @property
    def also(self) -> list[str]:
        """Return the names of further test figures."""
        return list(dict.fromkeys(name for record in self.records for row in record.rows for name in row.also))

    @property
    def own(self) -> Collection[str]:
        """Return the labels of strategies that no other domains run, which have no place among the rest."""
        return self.domain.sizes.get("more", ())

    @property
    def magnitude(self) -> float:
        """Return the largest magnitude of the test figure."""
        return max(abs(row.figure) for record in self.records for row in record.rows)

    def shares(self, label: str, cost: Callable[[Row | Record], float | None]) -> list[float]:
        """Return the cost of a search as a fraction of that of its training, for each seed."""
        pairs = [(cost(row), cost(record)) for record in self.records if (row := record.row(label)) is not None]
        return [mine / whole for mine, whole in pairs if mine is not None and whole and self.domain.ordered]

    def rows(self, label: str) -> list[Row]:
        """Return the rows with that label, one per seed that has it."""
        return [row for record in self.records if (row := record.row(label))]

    def difference(self, label: str, other: str) -> Interval | None:
        """Return the test figure of ``label`` minus that of ``other``, paired by seed, in the figure's unit."""
        pairs = [(record.row(label), record.row(other)) for record in self.records]
        return self._interval(pairs)

    def difference_to(self, label: str, other: Setting) -> Interval | None:
        """Return the test figure of ``label`` minus that of the last checkpoint of ``other``, paired by seed."""
        last = {record.seed: record.row("last") for record in other.records}
        return self._interval([(record.row(label), last.get(record.seed)) for record in self.records])

    def sign(self, label: str, other: str) -> int | None:
        """Return the sign of that difference; None if there are too few seeds, or the order of checkpoints is none."""
        difference = self.difference(label, other)
        ordered = self.domain.ordered or not {label, other} & ORDERED
        return None if difference is None or difference.count < FEWEST or not ordered else difference.sign

    def early(self, label: str) -> Interval | None:
        """Return the figure of a strategy on the first 60 % minus that of the whole run's last checkpoint."""
        return self._interval([(record.row(label, record.early), record.row("last")) for record in self.records])

    def swept(self, kind: str, k: int) -> list[float]:
        """Return the figures of SeWA or LAWA at that K, one per seed, in the figure's unit."""
        return [
            self.domain.scale * row.figure
            for record in self.records
            for row in record.sweep
            if row.label == kind and row.used == k
        ]

    @property
    def ks(self) -> list[int]:
        """Return the values of K that were run."""
        return sorted({int(row.used) for record in self.records for row in record.sweep})

    def loss_changes(self, label: str) -> list[float]:
        """Return the test loss of ``label`` less that of SWA, as a fraction of SWA's, for each seed."""
        pairs = [(record.row(label), record.row("SWA")) for record in self.records]
        return [(a.test_loss - b.test_loss) / abs(b.test_loss) for a, b in pairs if a is not None and b is not None]

    def places(self, better: Callable[[Row], float] = lambda row: row.figure) -> dict[str, float]:
        """Return label → mean place by test figure, or by ``better``, among ckptavg's strategies; 1 is the best.

        Ties share a place.
        """
        labels = [label for label in self.labels if label not in self.own]
        labels = [label for label in labels if self.domain.ordered or label not in ORDERED]
        labels = [label for label in labels if all(row.seconds is not None for row in self.rows(label))]
        labels = [label for label in labels if len(self.rows(label)) == len(self.records) and label != "best subset"]
        places = [rankdata([-better(row) for label in labels if (row := record.row(label))]) for record in self.records]
        return {label: fmean(place[i] for place in places) for i, label in enumerate(labels)}

    def agreement(self) -> list[float]:
        """Return Spearman's correlation of −validation loss and the figure over mixtures, for each seed with points."""
        found: list[float] = []
        for record in self.records:
            losses, figures = zip(*record.points, strict=True)
            if len(set(losses)) > 1 and len(set(figures)) > 1:
                found.append(float(spearmanr([-loss for loss in losses], figures).statistic))
        return found

    def picks(self) -> int:
        """Return in how many seeds the row with the lowest validation loss also has the highest figure."""
        return sum(
            min(ran, key=lambda row: row.val_loss).figure == max(row.figure for row in ran)
            for record in self.records
            if (ran := [row for row in record.rows if row.seconds is not None and row.label != "best subset"])
        )

    def _interval(self, pairs: Sequence[tuple[Row | None, Row | None]]) -> Interval | None:
        known = [self.domain.scale * (a.figure - b.figure) for a, b in pairs if a is not None and b is not None]
        return Interval.of(known) if known else None


def constant(one: Setting, found: Sequence[Setting]) -> Setting | None:
    """Return the setting of the same domain at a constant learning rate, if ``one`` decays and there is one."""
    same = (other for other in found if (other.name, other.schedule) == (one.name, "constant"))
    return None if one.schedule == "constant" else next(same, None)


def settings(records: Sequence[Record]) -> list[Setting]:
    """Group records by domain and schedule, in order of first appearance; seeds in theirs."""
    kinds = dict.fromkeys((record.domain, record.schedule) for record in records)
    order = list(dict.fromkeys(name for name, _ in kinds))
    found = [
        Setting(
            name=name,
            schedule=schedule,
            records=sorted(
                (one for one in records if (one.domain, one.schedule) == (name, schedule)), key=lambda one: one.seed
            ),
        )
        for name, schedule in kinds
    ]
    return sorted(found, key=lambda one: (order.index(one.name), one.schedule))
