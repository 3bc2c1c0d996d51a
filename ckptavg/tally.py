"""From the losses and metrics of batches to the score of a pass.

Shape suffixes: U = units (examples, or batches where the task gives their mean only).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ckptavg.errors import TaskError
from ckptavg.objective import Each, Score, Split


class Tally:
    """The units of one pass, in the order they came; nothing waits for the device before `score`.

    Args:
        sign: 1 where a larger metric is better, −1 where a smaller one is.
        bounds: what the metric lies within, or None; a value outside is a TaskError.
    """

    def __init__(self, sign: float, bounds: tuple[float, float] | None) -> None:
        self._sign = sign
        self._bounds = bounds
        self._losses: list[Tensor] = []
        self._metrics: list[Tensor] = []
        self._counts: list[int] = []
        self._told = 0  # batches that `part` has given
        self._seen = 0.0  # of what `hopeless` was asked about, after each batch

    @property
    def examples(self) -> int:
        """How many were added."""
        return sum(self._counts)

    def add(self, loss: Any, metric: Any, count: int) -> None:
        """A batch of ``count`` examples; ``metric`` is None where the task has none.

        Raises:
            TaskError: if either is neither a number nor one for each example.
        """
        number = len(self._counts) + 1
        self._losses.append(_units(loss, count, "loss", number))
        if metric is not None:
            self._metrics.append(_units(metric, count, "metric", number))
        self._counts.append(count)

    def part(self) -> dict[str, Any]:
        """What was added since the last part, for `restore`; waits for the device."""
        new = slice(self._told, None)
        self._told = len(self._counts)
        return {
            "counts": self._counts[new],
            "sizes": [[len(units) for units in kept[new]] for kept in (self._losses, self._metrics)],
            "losses": _host(self._losses[new]),
            "metrics": _host(self._metrics[new]) if self._metrics else None,
        }

    def restore(self, part: dict[str, Any]) -> None:
        """Add the batches of a part."""
        losses, metrics = part["sizes"]
        self._losses += part["losses"].split(losses)
        if part["metrics"] is not None:
            self._metrics += part["metrics"].split(metrics)
        for units, count in zip(self._metrics[self._told :], part["counts"], strict=False):
            self._seen += self._sign * float(units.mean()) * count
        self._counts += part["counts"]
        self._told = len(self._counts)

    def hopeless(self, bar: float, total: int) -> bool:
        """Whether no values within the bounds, for the examples still missing, could bring the score up to ``bar``.

        The score is a float64 mean, and so is this limit. It is kept below the bar by more than their roundings
        (n·2⁻⁵² of the largest value), so that the finished sum would say the same. Waits for the device.

        Args:
            bar: a value of `Score`.
            total: examples of the whole pass.
        """
        assert self._bounds is not None
        metrics_U = _host(self._metrics[-1:])
        self._check_bounds(metrics_U)
        self._seen += self._sign * float(metrics_U.mean()) * self._counts[-1]
        most = (self._seen + max(self._sign * bound for bound in self._bounds) * (total - self.examples)) / total
        return most < bar - total * 2**-52 * max(map(abs, self._bounds))

    def score(self, what: str, split: Split, order: int = 0) -> Score:
        """The means over all examples; where one is NaN or infinite, a score that is `Score.invalid`.

        Args:
            what: names what was scored, in an error.
            split: on which data.
            order: tells apart the orders that examples came in.
        Raises:
            TaskError: if a metric left its bounds.
        """
        losses_U, metrics_U = _host(self._losses), _host(self._metrics) if self._metrics else None
        sizes = [len(units) for units in (self._metrics or self._losses)]
        if [len(units) for units in self._losses] != sizes:  # one is a mean over the batch, the other is not
            losses_U = torch.stack([units.mean() for units in self._losses]).to("cpu")
            metrics_U = torch.stack([units.mean() for units in self._metrics]).to("cpu")
            sizes = [1] * len(self._losses)
        examples_U = torch.tensor(
            [count / size for count, size in zip(self._counts, sizes, strict=True) for _ in range(size)],
            dtype=torch.float64,
        )
        examples = self.examples
        loss = float(losses_U.dot(examples_U)) / examples
        metric = None if metrics_U is None else float(metrics_U.dot(examples_U)) / examples
        value = -loss if metric is None else self._sign * metric
        if not (math.isfinite(value) and math.isfinite(loss)):
            bad = _first_bad(self._losses, "loss()") or _first_bad(self._metrics, "metric()") or "a mean overflows"
            where = f"{what}: {bad} of the {split} data"
            return Score(value=-math.inf, loss=math.inf, metric=metric, examples=examples, invalid=where)
        if metrics_U is not None and self._bounds is not None:
            self._check_bounds(metrics_U)
        values_U = -losses_U if metrics_U is None else self._sign * metrics_U
        each = Each(values_U=values_U, losses_U=losses_U, examples_U=examples_U, order=order)
        return Score(value=value, loss=loss, metric=metric, examples=examples, each=each)

    def _check_bounds(self, metrics_U: Tensor) -> None:
        assert self._bounds is not None
        low, high = self._bounds
        outside = metrics_U[(metrics_U < low) | (metrics_U > high)]
        if len(outside):
            raise TaskError(f"metric gave {float(outside[0])}, outside metric_bounds {self._bounds}")


def _host(units: list[Tensor]) -> Tensor:
    """All of them, on the CPU; those that an earlier run left are there already."""
    return torch.cat([part.to(units[-1]) for part in units]).to("cpu", torch.float64)


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
