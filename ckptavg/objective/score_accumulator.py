"""From the losses and metrics of batches to the score of a pass.

Shape suffixes: U = units (examples, or batches where the task gives their mean only).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ckptavg.errors import TaskError
from ckptavg.runtime.workers import ALONE, Workers, interleave
from ckptavg.score import PerExample, Score, Split


@dataclass(frozen=True)
class _Batch:
    """What one batch adds."""

    count: int
    mark: int
    losses_U: Tensor
    metrics_U: Tensor | None


class ScoreAccumulator:
    """The units of one pass, in the order they came; nothing waits for the device before `score`.

    Args:
        sign: 1 where a larger metric is better, −1 where a smaller one is.
        bounds: what the metric lies within, or None; a value outside is a TaskError.
        workers: each of whom adds every ``world``-th batch; they are put in order again.
    """

    def __init__(self, sign: float, bounds: tuple[float, float] | None, workers: Workers = ALONE) -> None:
        self._sign = sign
        self._bounds = bounds
        self._workers = workers
        self._batches: list[_Batch] = []
        self._told = 0  # batches that `part` has given
        self._asked = 0  # batches that `hopeless` was asked about
        self._seen = torch.zeros(2, dtype=torch.float64)  # of all workers, then: their metrics' sum and their examples

    def add(self, loss: Any, metric: Any, count: int, mark: int = 0) -> None:
        """A batch of ``count`` examples; ``metric`` is None where the task has none.

        Args:
            loss: a mean, or one value for each example.
            metric: likewise.
            count: of examples.
            mark: tells these examples from others.
        Raises:
            TaskError: if either is neither a number nor one for each example.
        """
        number = self._workers.rank + self._workers.world_size * len(self._batches) + 1
        losses_U = _units(loss, count, "loss", number)
        metrics_U = None if metric is None else _units(metric, count, "metric", number)
        self._batches.append(_Batch(count, mark, losses_U, metrics_U))

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last part, for `restore`; waits for the device."""
        batches, units, sizes = _columns(self._batches[self._told :])
        self._told = len(self._batches)
        return {"batches": batches, "units": units, "sizes": sizes}

    def load_state_dict(self, part: dict[str, Any]) -> None:
        """Add the batches of a part."""
        self._batches += _split_batches(part["batches"], part["units"], part["sizes"])
        self._told = len(self._batches)

    def cannot_reach(self, bar: float, total: int) -> bool:
        """Whether no values within the bounds, for the examples still missing, could bring the score up to ``bar``.

        The score is a float64 mean, and so is this limit. It is kept below the bar by more than their roundings
        (n·2⁻⁵² of the largest value), so that the finished sum would say the same. Waits for the device.

        Args:
            bar: a value of `Score`.
            total: examples of the whole pass.
        """
        assert self._bounds is not None
        new = torch.zeros(2, dtype=torch.float64)
        for batch in self._batches[self._asked :]:
            assert batch.metrics_U is not None
            metrics_U = batch.metrics_U.to("cpu", torch.float64)
            self._check_bounds(metrics_U)
            new += torch.tensor([self._sign * float(metrics_U.mean()) * batch.count, batch.count], dtype=torch.float64)
        self._asked = len(self._batches)
        self._seen += self._workers.sum(new)
        seen, examples = self._seen.tolist()
        most = (seen + max(self._sign * bound for bound in self._bounds) * (total - examples)) / total
        return most < bar - total * 2**-52 * max(map(abs, self._bounds))

    def score(self, what: str, split: Split) -> Score | None:
        """The means over all examples; where one is NaN or infinite, a score that is `Score.invalid`. None without any.

        Args:
            what: names what was scored, in an error.
            split: on which data.
        Raises:
            TaskError: if a metric left its bounds.
        """
        found = interleave([_split_batches(*columns) for columns in self._workers.gather(_columns(self._batches))])
        if not found:
            return None
        losses = [batch.losses_U for batch in found]
        metrics = [batch.metrics_U for batch in found if batch.metrics_U is not None]
        bad = _first_bad(losses, "loss()") or _first_bad(metrics, "metric()") or "a mean overflows"
        sizes = [len(units) for units in (metrics or losses)]
        if [len(units) for units in losses] != sizes:  # one is a mean over the batch, the other is not
            losses, metrics = ([units.mean().view(1) for units in kind] for kind in (losses, metrics))
            sizes = [1] * len(losses)
        losses_U, metrics_U = torch.cat(losses), torch.cat(metrics) if metrics else None
        examples_U = torch.tensor(
            [batch.count / size for batch, size in zip(found, sizes, strict=True) for _ in range(size)],
            dtype=torch.float64,
        )
        examples = sum(batch.count for batch in found)
        order = 0
        for batch in found:
            order = zlib.crc32(batch.mark.to_bytes(4), order)
        loss = float(losses_U.dot(examples_U)) / examples
        metric = None if metrics_U is None else float(metrics_U.dot(examples_U)) / examples
        value = -loss if metric is None else self._sign * metric
        if not (math.isfinite(value) and math.isfinite(loss)):
            where = f"{what}: {bad} of the {split} data"
            return Score(value=-math.inf, loss=math.inf, metric=metric, examples=examples, invalid=where)
        if metrics_U is not None and self._bounds is not None:
            self._check_bounds(metrics_U)
        values_U = -losses_U if metrics_U is None else self._sign * metrics_U
        each = PerExample(values_U=values_U, losses_U=losses_U, examples_U=examples_U, order=order)
        return Score(value=value, loss=loss, metric=metric, examples=examples, per_example=each)

    def _check_bounds(self, metrics_U: Tensor) -> None:
        assert self._bounds is not None
        low, high = self._bounds
        outside = metrics_U[(metrics_U < low) | (metrics_U > high)]
        if len(outside):
            raise TaskError(f"metric gave {float(outside[0])}, outside metric_bounds {self._bounds}")


def _host(units: Sequence[Tensor]) -> Tensor:
    """All of them, on the CPU; those that an earlier run left are there already."""
    return torch.cat([part.to(units[-1]) for part in units]).to("cpu", torch.float64)


_Columns: TypeAlias = tuple[list[tuple[int, int]], list[Tensor], list[list[int]]]


def _columns(batches: Sequence[_Batch]) -> _Columns:
    """Counts and marks; all losses and all metrics, on the CPU in float64; and how many of them a batch has."""
    kinds = [[one.losses_U for one in batches], [one.metrics_U for one in batches if one.metrics_U is not None]]
    units = [_host(kind) for kind in kinds if kind]
    return [(one.count, one.mark) for one in batches], units, [list(map(len, kind)) for kind in kinds]


def _split_batches(
    known: Sequence[tuple[int, int]], units: Sequence[Tensor], sizes: Sequence[list[int]]
) -> list[_Batch]:
    """The batches that `_columns` was made of."""
    parts = [list(column.split(size)) for column, size in zip(units, sizes, strict=False)]
    rows = zip(known, *parts, strict=True)
    return [_Batch(count, mark, row[0], row[1] if len(row) > 1 else None) for (count, mark), *row in rows]


def _first_bad(units: list[Tensor], function: str) -> str:
    """The first batch with a number that is not finite; "" if there is none."""
    for number, values_U in enumerate(units, 1):
        if len(bad_U := values_U[~values_U.isfinite()]):
            return f"{function} gave {float(bad_U[0])} in batch {number}"
    return ""


def _units(value: Any, count: int, function: str, number: int) -> Tensor:
    """[count], or [1] where the task gave a mean; in the widest type the device has."""
    if isinstance(value, bool | int | float):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor) or value.is_complex() or value.numel() not in (1, count):
        got = f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            got = f"a {'complex ' if value.is_complex() else ''}tensor of shape {list(value.shape)}"
        raise TaskError(
            f"{function}() must give a scalar or one real number an example [{count}], not {got}, for batch {number}"
        )
    return value.detach().flatten().to(torch.float32 if value.device.type == "mps" else torch.float64)
