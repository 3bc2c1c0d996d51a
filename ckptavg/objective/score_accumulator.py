"""Accumulate the losses and metrics of batches into the score of a pass.

Shape suffixes: U = units (examples, or batches if the task returns only their mean).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ckptavg.errors import TaskError
from ckptavg.runtime.workers import ALONE, Workers, interleave
from ckptavg.score import PerExample, Score, Split, standard_error
from ckptavg.tasks.batch import joined


@dataclass(frozen=True)
class _Batch:
    count: int
    checksum: int
    losses_U: Tensor
    metrics_U: Tensor | None


class ScoreAccumulator:
    """Units of one pass, in order; `add` does not wait for the device.

    Args:
        sign: 1 if a larger metric is better, −1 if a smaller one is.
        bounds: the range of the metric, or None; a value outside it is a TaskError.
        workers: the ranks; each adds every ``world_size``-th batch, and `score` puts them back in order.
    """

    def __init__(self, sign: float, bounds: tuple[float, float] | None, workers: Workers = ALONE) -> None:
        self._sign = sign
        self._bounds = bounds
        self._workers = workers
        self._batches: list[_Batch] = []
        self._checked = 0  # batches that `cannot_reach` has seen
        # over those batches of all ranks: sum of sign * metric, and number of examples
        self._sums = torch.zeros(2, dtype=torch.float64)

    def add(self, loss: Any, metric: Any, count: int, checksum: int = 0) -> None:
        """Add a batch of ``count`` examples.

        Args:
            loss: the mean loss, or one value per example.
            metric: likewise; None if the task has no metric.
        Raises:
            TaskError: if either is neither a scalar nor one number per example.
        """
        number = self._workers.rank + self._workers.world_size * len(self._batches) + 1
        losses_U = _units(loss, count, "loss", number)
        metrics_U = None if metric is None else _units(metric, count, "metric", number)
        self._batches.append(_Batch(count, checksum, losses_U, metrics_U))

    def cannot_reach(self, threshold: float, total: int) -> bool:
        """Return True if the score stays below ``threshold`` whatever in-bounds values the remaining examples have.

        The score and this upper bound are float64 means. The bound must be below the threshold by more than their
        rounding errors (n·2⁻⁵² of the largest value), so the finished score is sure to be below too. Waits for the
        device.

        Args:
            threshold: a value of `Score`.
            total: the number of examples in the whole pass.
        """
        assert self._bounds is not None
        new = torch.zeros(2, dtype=torch.float64)
        for batch in self._batches[self._checked :]:
            assert batch.metrics_U is not None
            metrics_U = batch.metrics_U.to("cpu", torch.float64)
            self._check_bounds(metrics_U)
            new += torch.tensor([self._sign * float(metrics_U.mean()) * batch.count, batch.count], dtype=torch.float64)
        self._checked = len(self._batches)
        self._sums += self._workers.sum(new)
        metric_sum, examples = self._sums.tolist()
        upper_bound = (metric_sum + max(self._sign * bound for bound in self._bounds) * (total - examples)) / total
        return upper_bound < threshold - total * 2**-52 * max(map(abs, self._bounds))

    def score(self, what: str, split: Split) -> Score | None:
        """Return the means over all examples, `Score.invalid` if one is NaN or infinite; None if there are no batches.

        Args:
            what: the name of the model in an error.
            split: the split that was scored.
        Raises:
            TaskError: if a metric is outside its bounds.
        """
        batches = interleave(list(map(_split_batches, self._workers.gather(_columns(self._batches)))))
        if not batches:
            return None
        losses = [batch.losses_U for batch in batches]
        metrics = [batch.metrics_U for batch in batches if batch.metrics_U is not None]
        bad = _first_bad(losses, "loss()") or _first_bad(metrics, "metric()") or "a mean overflows"
        sizes = [len(units) for units in (metrics or losses)]
        if [len(units) for units in losses] != sizes:  # per-example losses with batch-mean metrics, or the reverse
            losses, metrics = ([units.mean().view(1) for units in kind] for kind in (losses, metrics))
            sizes = [1] * len(losses)
        losses_U, metrics_U = torch.cat(losses), torch.cat(metrics) if metrics else None
        counts = [batch.count / size for batch, size in zip(batches, sizes, strict=True) for _ in range(size)]
        examples_U = torch.tensor(counts, dtype=torch.float64)
        examples = sum(batch.count for batch in batches)
        order = 0
        for batch in batches:
            order = joined(order, batch.checksum, batch.count)
        loss = float(losses_U.dot(examples_U)) / examples
        metric = None if metrics_U is None else float(metrics_U.dot(examples_U)) / examples
        value = -loss if metric is None else self._sign * metric
        if not (math.isfinite(value) and math.isfinite(loss)):
            where = f"{what}: {bad} of the {split} data"
            return Score(value=-math.inf, loss=math.inf, metric=metric, examples=examples, invalid=where)
        if metrics_U is not None and self._bounds is not None:
            self._check_bounds(metrics_U)
        values_U = -losses_U if metrics_U is None else self._sign * metrics_U
        each = PerExample(values_U=values_U, examples_U=examples_U, order=order)
        noise = standard_error(losses_U, examples_U)
        return Score(value=value, loss=loss, metric=metric, examples=examples, per_example=each, loss_noise=noise)

    def _check_bounds(self, metrics_U: Tensor) -> None:
        assert self._bounds is not None
        low, high = self._bounds
        outside = metrics_U[(metrics_U < low) | (metrics_U > high)]
        if len(outside):
            raise TaskError(f"metric gave {float(outside[0])}, outside metric_bounds {self._bounds}")


_Columns: TypeAlias = tuple[list[tuple[int, int]], list[Tensor], list[list[int]]]


def _columns(batches: Sequence[_Batch]) -> _Columns:
    """Flatten batches into counts and checksums, all losses and metrics (CPU, float64), and units per batch."""
    metrics = [batch.metrics_U for batch in batches if batch.metrics_U is not None]
    kinds = [[batch.losses_U for batch in batches], metrics]
    units = [torch.cat(kind).to("cpu", torch.float64) for kind in kinds if kind]
    return [(batch.count, batch.checksum) for batch in batches], units, [list(map(len, kind)) for kind in kinds]


def _split_batches(columns: _Columns) -> list[_Batch]:
    """Invert `_columns`."""
    counts, units, sizes = columns
    kinds = [list(column.split(size)) for column, size in zip(units, sizes, strict=False)]
    rows = zip(counts, *kinds, strict=True)
    return [_Batch(count, checksum, row[0], row[1] if len(row) > 1 else None) for (count, checksum), *row in rows]


def _first_bad(units: list[Tensor], function: str) -> str:
    """Describe the first batch with a non-finite value; "" if all are finite."""
    for number, values_U in enumerate(units, 1):
        if len(bad_U := values_U[~values_U.isfinite()]):
            return f"{function} gave {float(bad_U[0])} in batch {number}"
    return ""


def _units(value: Any, count: int, function: str, number: int) -> Tensor:
    """Convert to [count], or [1] for a batch mean, in the widest floating-point dtype of the device."""
    if isinstance(value, bool | int | float):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor) or value.is_complex() or value.numel() not in (1, count):
        got = f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            got = f"a {'complex ' if value.is_complex() else ''}tensor of shape {list(value.shape)}"
        wanted = f"a scalar or one real number per example [{count}]"
        raise TaskError(f"{function}() must return {wanted}, not {got}, for batch {number}")
    return value.detach().flatten().to(torch.float32 if value.device.type == "mps" else torch.float64)
