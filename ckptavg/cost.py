"""Cost of a search: batches, examples and seconds, including what its cached scores cost to measure."""

import time
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Self

from ckptavg.score import Split

SECONDS: Final = "seconds"


class CostMeter:
    """Counts costs since `restart` as if the cache had been empty then.

    Compared strategies share their scores. Each is charged for every score it requests: a cached score costs as much as
    it did to measure.

    ``on_work`` is called with each batch as it starts, in forward batches: a backward pass counts as two.
    """

    def __init__(self, on_work: Callable[[float], None] = lambda units: None) -> None:
        self._on_work = on_work
        self._spent: Counter[str] = Counter()
        self._charged: set[Hashable] = set()
        self._prices: dict[Hashable, dict[str, float]] = {}
        self._borrowed: dict[str, float] = {}
        self.running: Sequence[int] = ()  # examples of each batch that the ranks run now
        self.restart()

    def restart(self) -> None:
        """Start a new account."""
        self._before = self._now()
        self._borrowed = {}
        self._charged = set()

    def count(self, kind: str, examples: int, batches: int = 1) -> None:
        """Add batches that ran ``forward`` or ``backward``."""
        self._spent[f"{kind}_batches"] += batches
        self._spent[f"{kind}_examples"] += examples
        self._on_work(batches * (2 if kind == "backward" else 1))

    def forward(self) -> None:
        """Add a forward pass over the batches that are `running`."""
        for examples in self.running:
            self.count("forward", examples)

    def evaluated(self) -> None:
        """Add one scored mixture."""
        self._spent["evaluations"] += 1

    @contextmanager
    def pricing(self, key: Hashable) -> Generator[None]:
        """Record the cost inside the context as the price of ``key``, unless it has one, and mark it as paid."""
        before = self._now()
        yield
        self._prices.setdefault(key, {name: value - before.get(name, 0) for name, value in self._now().items()})
        self._charged.add(key)

    @contextmanager
    def measure(self) -> Generator[dict[str, float]]:
        """Measure the cost inside the context without charging it; the yielded dictionary holds it at the end."""
        before, spent = self._now(), dict[str, float]()
        yield spent
        for name, value in self._now().items():
            spent[name] = value - before.get(name, 0)
            self._borrowed[name] = self._borrowed.get(name, 0) - spent[name]

    def price(self, key: Hashable, spent: dict[str, float]) -> None:
        """Record the cost of ``key``; every strategy that requests it is charged this much."""
        self._prices[key] = spent

    def charge(self, key: Hashable) -> None:
        """Add the price of a cached ``key``, once per account."""
        if key not in self._charged:
            self._charged.add(key)
            for name, value in self._prices.get(key, {}).items():  # no price if an interrupted run measured it
                self._borrowed[name] = self._borrowed.get(name, 0) + value

    def __getitem__(self, name: str) -> float:
        return self._now().get(name, 0) - self._before.get(name, 0) + self._borrowed.get(name, 0)

    def _now(self) -> dict[str, float]:
        return {**self._spent, SECONDS: time.perf_counter()}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a search.

    Attributes:
        forward_batches: forward passes over batches, for training, scoring and BatchNorm statistics.
        backward_batches: backward passes over batches.
        evaluations: the number of mixtures scored.
        seconds: wall-clock time.
        epochs: the same work in epochs over ``epochs_of``, a backward counted as two forwards; None if the size of that
            split is unknown.
        epochs_of: the split that defines an epoch.
        passes: the same work in forward passes over ``passes_over``, a backward counted as two; None likewise.
        passes_over: the split that is scored in the search.
    """

    forward_batches: int
    backward_batches: int
    evaluations: int
    seconds: float
    epochs: float | None
    epochs_of: Split
    passes: float | None = None
    passes_over: Split = "val"

    def __add__(self, other: Self) -> Self:
        """Return the cost of both; an amount that is unknown for one is unknown for both."""
        names = ("forward_batches", "backward_batches", "evaluations", "seconds", "epochs", "passes")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return replace(self, **{name: None if None in pair else sum(pair) for name, pair in pairs.items()})
