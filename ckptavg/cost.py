"""What a search costs: batches, examples and seconds, and what remembered scores would have cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Hashable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from ckptavg.score import Split

SECONDS: Final = "seconds"


class CostMeter:
    """Counts since `restart`, as if nothing had been remembered from before it.

    Strategies that are compared share their scores. Each is charged for all it asks for: what one finds measured
    already costs it what it cost the first.
    """

    def __init__(self) -> None:
        self._spent: Counter[str] = Counter()
        self._charged: set[Hashable] = set()
        self._prices: dict[Hashable, dict[str, float]] = {}
        self._borrowed: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Begin a new account."""
        self._before = self._now()
        self._borrowed = {}
        self._charged = set()

    def count(self, kind: str, examples: int, batches: int = 1) -> None:
        """So many batches went ``forward`` or ``backward``."""
        self._spent[f"{kind}_batches"] += batches
        self._spent[f"{kind}_examples"] += examples

    def evaluated(self) -> None:
        """A mixture was scored."""
        self._spent["evaluations"] += 1

    @contextmanager
    def pricing(self, key: Hashable) -> Generator[None]:
        """Remember what is spent within as the price of ``key``."""
        before = self._now()
        yield
        self._prices[key] = {name: value - before.get(name, 0) for name, value in self._now().items()}
        self._charged.add(key)

    @contextmanager
    def measure(self) -> Generator[dict[str, float]]:
        """Put what is spent within on nobody's account; it is what the dictionary holds at the end."""
        before, spent = self._now(), dict[str, float]()
        yield spent
        for name, value in self._now().items():
            spent[name] = value - before.get(name, 0)
            self._borrowed[name] = self._borrowed.get(name, 0) - spent[name]

    def price(self, key: Hashable, spent: dict[str, float]) -> None:
        """What ``key`` cost, of whom it was measured for; it is charged to whoever asks for it."""
        self._prices[key] = spent

    def charge(self, key: Hashable) -> None:
        """Something remembered was used: add its price, once an account."""
        if key not in self._charged:
            self._charged.add(key)
            for name, value in self._prices.get(key, {}).items():  # none for what an earlier run measured
                self._borrowed[name] = self._borrowed.get(name, 0) + value

    def charged(self, key: Hashable) -> bool:
        """Whether this account has paid for ``key``."""
        return key in self._charged

    def alias(self, key: Hashable, other: Hashable) -> None:
        """What ``key`` cost is the price of ``other`` too, where that has none, and it is paid for."""
        self._prices.setdefault(other, self._prices[key])
        self._charged.add(other)

    def __getitem__(self, name: str) -> float:
        return self._now().get(name, 0) - self._before.get(name, 0) + self._borrowed.get(name, 0)

    def _now(self) -> dict[str, float]:
        return {**self._spent, SECONDS: time.perf_counter()}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the search cost.

    Attributes:
        forward_batches: batches that went forward, for learning, scoring and BatchNorm statistics.
        backward_batches: batches that went backward.
        evaluations: mixtures that were scored.
        seconds: wall-clock time.
        epochs: the same work in epochs of ``epochs_of`` data, a backward counted as two forwards; None if its size
            is not known.
        epochs_of: the split whose size an epoch is.
    """

    forward_batches: int
    backward_batches: int
    evaluations: int
    seconds: float
    epochs: float | None
    epochs_of: Split
