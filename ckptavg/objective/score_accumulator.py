"""Accumulate the losses and metrics of batches into the score of a pass.

Shape suffixes: U = units (examples, or batches if the task returns only their mean).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from ckptavg.errors import TaskError
from ckptavg.runtime.workers import ALONE, Workers, interleave
from ckptavg.score import METRIC, PerExample, Score, Split, decided, sign, standard_error
from ckptavg.tasks.batch import joined
from ckptavg.tasks.probabilities import GOALS, calibration_gaps

_LOSS: Final = ""  # the name of the loss beside the metrics


@dataclass(frozen=True)
class _Batch:
    count: int
    checksum: int
    columns: Mapping[str, Tensor]  # name → values [U]


class ScoreAccumulator:
    """Units of one pass, in order; `add` does not wait for the device.

    Args:
        goal: ``max`` or ``min``, whichever is better for the task's own metrics; or goals by name.
        bounds: the range of the deciding metric, or None; a value outside it is a TaskError.
        workers: the ranks; each adds every ``world_size``-th batch, and `score` puts them back in order.
        key: the name of the metric that decides; None for the first of the task's own metrics, else the loss.
    """

    def __init__(
        self, goal: str | Mapping[str, str], bounds: tuple[float, float] | None, workers: Workers = ALONE, *,
        key: str | None = None,
    ) -> None:  # fmt: skip
        self._goal = goal
        self._bounds = bounds
        self._workers = workers
        self._key = key
        self._own: Sequence[str] = ()  # names of the task's own metrics, in order
        self._predicted: Collection[str] = ()  # names of metrics of class probabilities
        self._batches: list[_Batch] = []
        self._checked = 0  # batches that `cannot_reach` has seen
        # over those batches of all ranks: sum of sign * metric, number of examples, and sum of the signs
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(
        self, loss: Any, metric: Any, count: int, checksum: int = 0, predicted: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add a batch of ``count`` examples.

        Args:
            loss: the mean loss, or one value per example.
            metric: likewise, or several metrics by name; None if the task has no metric.
            predicted: the metrics of class probabilities by name.
        Raises:
            TaskError: if one is neither a scalar nor one number per example, or the names of the metrics are wrong.
        """
        number = self._workers.rank + self._workers.world_size * len(self._batches) + 1
        own = metric if isinstance(metric, Mapping) else {} if metric is None else {METRIC: metric}
        self._check_names([*own], predicted or {}, number)
        columns = {_LOSS: _units(loss, count, "loss()", number)}
        columns |= {name: _units(value, count, _function(name), number) for name, value in own.items()}
        columns |= {name: _units(value, count, "predict()", number) for name, value in (predicted or {}).items()}
        self._batches.append(_Batch(count, checksum, columns))

    def _check_names(self, own: Sequence[Any], predicted: Collection[str], number: int) -> None:
        if self._batches:
            if own != self._own:
                first = self._workers.rank + 1
                names = f"{_listed(own)} for batch {number}, but {_listed(self._own)} for batch {first}"
                raise TaskError(f"metric() must return the same names for every batch, not {names}")
            return
        if not all(isinstance(name, str) and name not in ("", "loss") for name in own):
            raise TaskError(f"metric() must return values by name, a string other than 'loss', not {own!r}")
        if both := [name for name in own if name in predicted]:
            raise TaskError(f"metric() and predict() both give {_listed(both)}", hint="rename it in metric()")
        self._own, self._predicted = own, [*predicted]
        goals = self._goal if isinstance(self._goal, Mapping) else {}
        for option, names in (("metric_key", [self._key] if self._key else []), ("metric_goal", [*goals])):
            if unknown := [name for name in names if name not in own and name not in predicted]:
                there = _listed(["one without a name" if name == METRIC else name for name in (*own, *predicted)])
                message = f"{option} names {_listed(unknown)}, but the metrics are {there}"
                instead = "remove metric_key" if option == "metric_key" else 'set metric_goal = "max" or "min"'
                hint = f'{instead}, or return {{"{unknown[0]}": value}} from metric()'
                raise TaskError(message, hint=hint if METRIC in own else None)
        if fixed := [name for name in goals if name in predicted and goals[name] != GOALS[name]]:
            raise TaskError(f"metric_goal of {_listed(fixed)} is fixed: {GOALS[fixed[0]]}")

    @property
    def _deciding(self) -> str:
        return self._key or next(iter(self._own), _LOSS)

    def _is_mean(self, name: str) -> bool:
        return name != "ece" or name not in self._predicted

    def _sign(self, name: str) -> float:
        return -1.0 if name == _LOSS else sign(GOALS if name in self._predicted else self._goal, name)

    def cannot_reach(self, threshold: float, total: int) -> bool:
        """Return True if the score stays below ``threshold`` whatever in-bounds values the remaining examples have.

        The score and this upper bound are float64 means. The bound must be below the threshold by more than their
        rounding errors (n·2⁻⁵² of the largest value), so the finished score is sure to be below too. The answer follows
        from sums over all ranks, as it must be the same for a rank without batches. Waits for the device.

        Args:
            threshold: a value of `Score`.
            total: the number of examples in the whole pass.
        """
        assert self._bounds is not None
        name, new = self._deciding, torch.zeros(3, dtype=torch.float64)
        for batch in self._batches[self._checked :] if self._is_mean(name) else ():
            metrics_U = batch.columns[name].to("cpu", torch.float64)
            self._check_bounds(metrics_U)
            direction = self._sign(name)
            terms = [direction * float(metrics_U.mean()) * batch.count, batch.count, direction]
            new += torch.tensor(terms, dtype=torch.float64)
        self._checked = len(self._batches)
        self._sums += self._workers.sum(new)
        metric_sum, examples, signs = self._sums.tolist()
        if signs == 0.0:  # no batch yet, or the metric is no mean
            return False
        best = max(math.copysign(1.0, signs) * bound for bound in self._bounds)
        upper_bound = (metric_sum + best * (total - examples)) / total
        return upper_bound < threshold - total * 2**-52 * max(map(abs, self._bounds))

    def score(self, what: str, split: Split, positions: Sequence[int] | None = None) -> Score | None:
        """Return the means over all examples, `Score.invalid` if one is NaN or infinite; None if there are no batches.

        Args:
            what: the name of the model in an error.
            split: the split that was scored.
            positions: the place of each example in `Score.per_example`; None keeps the order of the pass.
        Raises:
            TaskError: if a metric is outside its bounds, or ranks have metrics of different names.
        """
        parts = self._workers.gather((_flat(self._batches), (self._own, self._predicted)))
        names = [own for part, own in parts if part[0]]
        if not names:
            return None
        if any(own != names[0] for own in names):
            raise TaskError("metric() must return the same names for every batch")
        self._own, self._predicted = names[0]
        batches = interleave([_split_batches(part) for part, _ in parts])
        order = 0
        for batch in batches:
            order = joined(order, batch.checksum, batch.count)
        losses, mean = self._mean(_LOSS, batches, order)
        noise = standard_error(losses.values_U, losses.examples_U)
        examples, where = sum(batch.count for batch in batches), f"of the {split} data"

        def scored(name: str) -> Score:
            each, metric = self._mean(name, batches, order)
            if positions is not None and len(positions) == len(each.values_U):
                back = torch.tensor(positions).argsort()
                each = replace(each, values_U=each.values_U[back], examples_U=each.examples_U[back])
            bad = _first_bad(batches, _LOSS) or (name != _LOSS and _first_bad(batches, name)) or "a mean overflows"
            value, invalid = self._sign(name) * metric, ""
            if not (math.isfinite(metric) and math.isfinite(mean)):
                value, each, invalid = -math.inf, None, f"{what}: {bad} {where}"
            return Score(
                value=value, loss=math.inf if invalid else mean,
                metric=None if name == _LOSS else metric, examples=examples, per_example=each,
                loss_noise=math.inf if invalid else noise, invalid=invalid, name=name or METRIC,
            )  # fmt: skip

        deciding = self._deciding
        scores = {name: scored(name) for name in dict.fromkeys([deciding, *self._own, *self._predicted])}
        if self._bounds is not None and not scores[deciding].invalid and self._is_mean(deciding):
            self._check_bounds(torch.cat([batch.columns[deciding] for batch in batches]))
        return replace(decided(scores, deciding), name=deciding or METRIC)

    def _mean(self, name: str, batches: Sequence[_Batch], order: int) -> tuple[PerExample, float]:
        """Return the units of the loss or a metric on the scale of a score, and their mean on their own scale."""
        units = [batch.columns[name] for batch in batches]
        counts = [batch.count / len(u) for batch, u in zip(batches, units, strict=True) for _ in range(len(u))]
        values_U, examples_U = torch.cat(units), torch.tensor(counts, dtype=torch.float64)
        if not self._is_mean(name):
            values_U = calibration_gaps(values_U)
        mean = float(values_U.dot(examples_U)) / sum(batch.count for batch in batches)
        return PerExample(values_U=self._sign(name) * values_U, examples_U=examples_U, order=order), mean

    def _check_bounds(self, metrics_U: Tensor) -> None:
        assert self._bounds is not None
        low, high = self._bounds
        outside = metrics_U[(metrics_U < low) | (metrics_U > high)]
        if len(outside):
            raise TaskError(f"metric gave {float(outside[0])}, outside metric_bounds {self._bounds}")


_Flat: TypeAlias = tuple[list[tuple[int, int]], dict[str, tuple[Tensor, list[int]]]]


def _flat(batches: Sequence[_Batch]) -> _Flat:
    """Flatten batches into counts and checksums, and for each name all values (CPU, float64) and units per batch."""
    names = batches[0].columns if batches else ()
    kinds = {name: [batch.columns[name] for batch in batches] for name in names}
    columns = {name: (torch.cat(kind).to("cpu", torch.float64), list(map(len, kind))) for name, kind in kinds.items()}
    return [(batch.count, batch.checksum) for batch in batches], columns


def _split_batches(flat: _Flat) -> list[_Batch]:
    """Invert `_flat`."""
    counts, columns = flat
    parts = {name: values_U.split(sizes) for name, (values_U, sizes) in columns.items()}
    return [
        _Batch(count, checksum, {name: part[i] for name, part in parts.items()})
        for i, (count, checksum) in enumerate(counts)
    ]


def _function(name: str) -> str:
    return "loss()" if name == _LOSS else "metric()" if name == METRIC else f"metric()[{name!r}]"


def _listed(names: Collection[Any]) -> str:
    return ", ".join(map(str, names)) or "none"


def _first_bad(batches: Sequence[_Batch], name: str) -> str:
    """Describe the first batch with a non-finite value; "" if all are finite."""
    for number, batch in enumerate(batches, 1):
        values_U = batch.columns[name]
        if len(bad_U := values_U[~values_U.isfinite()]):
            return f"{_function(name)} gave {float(bad_U[0])} in batch {number}"
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
        raise TaskError(f"{function} must return {wanted}, not {got}, for batch {number}")
    return value.detach().flatten().to(torch.float32 if value.device.type == "mps" else torch.float64)
