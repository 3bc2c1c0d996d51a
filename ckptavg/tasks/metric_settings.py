"""The settings of a task file's metrics: ``metric_key``, ``metric_goal`` and ``metric_bounds``."""

from collections.abc import Mapping, Sequence
from typing import Any

from ckptavg.errors import TaskError
from ckptavg.tasks.torch_metrics import metric_goal


class MetricSettings:
    """Settings of the metrics in ``module``, the task file ``source`` or the objects of a task.

    Args:
        names: the names of metrics that are known before the first batch.
        own: whether the task has a function ``metric``, whose names are known after the first batch.
    Raises:
        TaskError: if ``metric_key`` is certain to name no metric.
    """

    def __init__(self, module: Any, source: str, names: Sequence[str], *, own: bool) -> None:
        self._module = module
        self._source = source
        self.key: str | None = getattr(module, "metric_key", None)
        if self.key is not None and (type(self.key) is not str or (not own and self.key not in names)):
            there = f"the metrics are {', '.join(names)}" if names else "the task has no metric"
            raise TaskError(f"metric_key is {self.key!r}, but {there}", path=source)

    def goal(self, named: Mapping[str, Any]) -> str | Mapping[str, str]:
        """Return the goal of the task's own metrics, or goals by name; ``named`` are torchmetrics, which declare it."""
        goal = getattr(self._module, "metric_goal", {} if named else "max")
        by_name = isinstance(goal, Mapping)
        if not all(one in ("max", "min") for one in (goal.values() if by_name else [goal])):
            message = f"metric_goal must be 'max' or 'min', not {goal!r}"
            raise TaskError(message, path=self._source, hint='or a dict such as {"accuracy": "max", "nll": "min"}')
        if not named:
            return goal
        stated: Mapping[str, str] = goal if by_name else {self.key or next(iter(named)): goal}
        if unknown := [name for name in stated if name not in named]:
            message = f"metric_goal names {unknown[0]!r}, but the metrics are {', '.join(named)}"
            raise TaskError(message, path=self._source)
        goals = {name: stated.get(name) or metric_goal(metric) for name, metric in named.items()}
        for name, one in goals.items():
            if one is None:
                message = (
                    f"does not set metric_goal, and {type(named[name]).__name__} does not declare higher_is_better"
                )
                hint = 'set metric_goal = "max" or "min"' + (", in a dict by name" if len(named) > 1 else "")
                raise TaskError(message, path=self._source, hint=hint)
        return {name: one for name, one in goals.items() if one is not None}

    def bounds(self) -> tuple[float, float] | None:
        """Return the range of the deciding metric for one example; None if it is not set."""
        bounds = getattr(self._module, "metric_bounds", None)
        if bounds is None:
            return None
        try:
            low, high = map(float, bounds)
        except (TypeError, ValueError):
            low = high = float("nan")
        if not -float("inf") < low < high < float("inf"):
            raise TaskError(f"metric_bounds must be two numbers such as (0.0, 1.0), not {bounds!r}", path=self._source)
        return low, high
