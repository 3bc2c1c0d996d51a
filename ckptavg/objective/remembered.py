"""Measurements that are made once: kept in memory, written to the journal, and charged on every request."""

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from ckptavg.context import Run
from ckptavg.cost import SECONDS, CostMeter

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")
_Key = TypeVar("_Key", contravariant=True)


class Codec(Protocol[_Key, _V]):
    """Translates one kind of measurement to the journal and back; it is all that a new kind needs.

    ``name`` returns the journal key of a measurement, unique over all kinds; ``encode`` a JSON record of its value, bit
    for bit, or None if it cannot be recorded; ``decode`` the value of a record.
    """

    def name(self, key: _Key) -> str: ...  # noqa: D102
    def encode(self, key: _Key, value: _V) -> Any: ...  # noqa: D102
    def decode(self, key: _Key, record: Any) -> _V: ...  # noqa: D102


class Remembered(Generic[_K, _V]):
    """Measurements of one kind by key.

    Args:
        codec: the kind of measurement.
        run: has the journal, and the ranks that divide a `prefetch`.
        meter: records what each measurement costs.
    """

    def __init__(self, codec: Codec[_K, _V], run: Run, meter: CostMeter) -> None:
        self.codec = codec
        self._run = run
        self._meter = meter
        self._values: dict[_K, _V] = {}

    @property
    def empty(self) -> bool:
        """Whether no value is in memory."""
        return not self._values

    @property
    def values(self) -> Mapping[_K, _V]:
        """The values in memory, in the order in which they were measured or read."""
        return self._values

    def find(self, key: _K, measure: Callable[[], _V]) -> _V:
        """Return the value from memory, else from an interrupted run's journal, else from ``measure``."""
        if self.known(key):
            self._meter.charge((self, key))
        else:
            with self._meter.pricing((self, key)):
                value = measure()
            self.keep(key, value)
        return self._values[key]

    def prefetch(self, keys: Iterable[_K], measure: Callable[[_K], _V], *, whole_rounds: bool = False) -> None:
        """Measure the keys that are not known yet, one on each rank at a time.

        ``whole_rounds`` leaves out the last keys if there are fewer of them than ranks.
        """
        workers = self._run.workers
        missing = [key for key in dict.fromkeys(keys) if not self.known(key)]
        if whole_rounds:
            del missing[len(missing) - len(missing) % workers.world_size :]

        def priced(key: _K) -> tuple[_V, dict[str, float]]:
            with self._meter.measure() as spent:
                value = measure(key)
            return value, spent | {SECONDS: spent[SECONDS] / workers.world_size}

        for done, (key, (value, spent)) in enumerate(workers.map_parallel(missing, priced), 1):
            self._meter.price((self, key), spent)
            self.keep(key, value)
            self._run.progress("scoring in parallel", done, len(missing))

    def prefetch_together(
        self, keys: Iterable[_K], measure: Callable[[Sequence[_K]], Generator[tuple[_K, _V]]]
    ) -> None:
        """Measure the keys that are not known yet in one call, which yields them in any order; each costs the same."""
        missing = [key for key in dict.fromkeys(keys) if not self.known(key)]
        with self._meter.measure() as spent, closing(measure(missing)) as measured:
            for done, (key, value) in enumerate(measured, 1):
                self.keep(key, value)
                self._run.progress("scoring in parallel", done, len(missing))
        for key in missing:
            self._meter.price((self, key), {name: amount / len(missing) for name, amount in spent.items()})

    def known(self, key: _K) -> bool:
        """Return whether the value is in memory or in the journal of an interrupted run, from which it is read."""
        return key in self._values or self.recorded(key)

    def recorded(self, key: _K) -> bool:
        """Return whether the value is in the journal of an interrupted run, from which it is read."""
        record = self._run.journal.get(self.codec.name(key), earlier=True)
        if record is None:
            return False
        self._values[key] = self.codec.decode(key, record)
        return True

    def keep(self, key: _K, value: _V) -> None:
        """Keep a measured value in memory and in the journal."""
        self._values[key] = value
        self._run.journal.defer(self.codec.name(key), partial(self.codec.encode, key, value))
        self._run.journal.flush()
