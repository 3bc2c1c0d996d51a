"""A torchmetrics metric as a task's metric: one value over a whole split, and over resamples of its batches."""

import math
import re
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn

from ckptavg.errors import CkptavgError, TaskError, is_out_of_memory

_RTOL: Final = 1e-3  # summing float32 states in another order differs by far less, even after cancellation to nearly 0
_ATOL: Final = 1e-6


def is_torchmetric(metric: object) -> bool:
    """Return whether ``metric`` is a torchmetrics object, without importing torchmetrics."""
    return (
        not isinstance(metric, type)
        and any(kind.__module__.split(".")[0] == "torchmetrics" for kind in type(metric).__mro__)
        and all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))
    )


def metric_goal(metric: Any) -> Literal["max", "min"] | None:
    """Return the direction that ``higher_is_better`` declares; None if the metric does not declare it."""
    better = getattr(metric, "higher_is_better", None)
    return None if better is None else "max" if better else "min"


def metrics_by_name(metric: object) -> dict[str, Any]:
    """Return the torchmetrics of a task by name: one metric, a MetricCollection or a dict; empty for anything else."""
    if any(kind.__name__ == "MetricCollection" for kind in type(metric).__mro__) and is_torchmetric(metric):
        return dict(metric.items())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(metric, Mapping) and metric and all(map(is_torchmetric, metric.values())):
        return dict(metric)
    return {_name(metric): metric} if is_torchmetric(metric) else {}


def _name(metric: object) -> str:
    """Return the name of a metric in reports, from its class and its average over classes: ``macro F1``."""
    name = re.sub(r"^(Binary|Multiclass|Multilabel)(?=[A-Z])|(?<=\w)Score$", "", type(metric).__name__)
    average = getattr(metric, "average", None)
    return f"{average} {name}" if isinstance(average, str) else name


def update(corpus: Mapping[str, "CorpusMetric"], model: nn.Module, batch: Any) -> None:
    """Run the model once on a batch, and update all metrics with its outputs; see `CorpusMetric.update`."""
    arguments = next(iter(corpus.values())).arguments(model, batch)
    for metric in corpus.values():
        metric.add(arguments)


class CorpusMetric:
    """A torchmetrics metric over a split, with the states of each batch kept as well.

    `compute` is the metric's own value, from states updated with all batches in order. For a resample, the states that
    each of its batches leaves in a fresh metric are merged as torchmetrics merges those of several processes: each by
    its ``dist_reduce_fx``, applied to the stacked tensors; lists are joined. `update` updates twice per batch for this.
    ``Metric.merge_state`` cannot be used: it refuses metrics that do not set ``full_state_update`` to False.

    Args:
        metric: the metric of the task file ``source``; it is copied, and the copy moves to the device of its arguments.
        predict: the task's function from model and batch to the tuple of arguments of ``metric.update``; None takes
            batches as pairs (inputs, targets) and calls ``metric.update(model(inputs), targets)``.
    """

    def __init__(
        self, metric: Any, *, source: str, predict: Callable[[nn.Module, Any], tuple[Any, ...]] | None = None
    ) -> None:
        self._source = source
        self._name = type(metric).__name__
        self._predict = predict
        self._whole: Any = metric.clone()
        self._whole.reset()
        self._scratch: Any = metric.clone()
        self._states: list[list[Mapping[str, Any]]] = []  # of each batch and nested metric
        self._is_mergeable = False

    def state_dict(self) -> dict[str, Any]:
        """Return all states, for `load_state_dict`."""
        return {"whole": _states(self._whole), "batches": self._states}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set the states that `state_dict` returned, on the CPU."""
        self._states = saved["batches"]
        for metric in (self._whole, self._scratch):
            metric.to("cpu")
        _load(self._whole, saved["whole"], self.batches)

    @property
    def batches(self) -> int:
        """Number of batches added."""
        return len(self._states)

    def update(self, model: nn.Module, batch: Any) -> None:
        """Run the model on a batch and update the metric with its outputs; TaskError if any of this fails."""
        self.add(self.arguments(model, batch))

    def add(self, arguments: tuple[Any, ...]) -> None:
        """Update the metric with these arguments; TaskError if that fails."""
        with torch.no_grad(), self._translate_errors(f"{self._name}.update"):
            device = next((value.device for value in arguments if isinstance(value, torch.Tensor)), None)
            self._scratch.reset()
            for metric in (self._whole, self._scratch):
                if device is not None and metric.device != device:
                    metric.to(device)
                metric.update(*arguments)
        self._states.append(_states(self._scratch))

    def compute(self) -> float:
        """Return the value over all batches, negated by the caller for a loss; TaskError unless it is one number."""
        if not self._states:
            raise TaskError("the metric has seen no batches", path=self._source)
        return self._value_of(self._whole)

    def resampled(self, indices: Sequence[int]) -> float:
        """Return the metric's value over the batches ``indices``, numbered as added; indices may repeat.

        Warnings of torchmetrics, such as for a resample without positives, are suppressed. It is a TaskError if merging
        the states of all batches differs from `compute`, or for the reasons of `compute`.
        """
        if not indices:
            raise TaskError("a resample needs at least one batch", path=self._source)
        if not self._is_mergeable:
            merged, value = self._compute_merged(range(self.batches)), self.compute()
            if not math.isclose(merged, value, rel_tol=_RTOL, abs_tol=_ATOL):
                raise TaskError(
                    f"the states of {self._name} cannot be merged: {merged} from its batches, {value} from all at once",
                    path=self._source,
                    hint="declare how with add_state(…, dist_reduce_fx=…), such as 'sum'",
                )
            self._is_mergeable = True
        return self._compute_merged(indices)

    def _compute_merged(self, indices: Sequence[int]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self._translate_errors(f"{self._name}.compute"):
                merged = [
                    {
                        name: _merge_states([self._states[i][place][name] for i in indices], reduce)
                        for name, reduce in metric._reductions.items()
                    }
                    for place, metric in enumerate(_metrics(self._scratch))
                ]
                _load(self._scratch, merged, len(indices))
            value = self._value_of(self._scratch)
        if not math.isfinite(value):
            raise TaskError(f"the metric is {value}", path=self._source)
        return value

    def arguments(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        """Run the model on a batch without gradients, and return the arguments of ``metric.update``."""
        with torch.no_grad():
            return self._outputs(model, batch)

    def _outputs(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        if self._predict is None:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                hint = "define predict(model, batch) in the task file, returning the arguments of metric.update"
                got = f"{len(batch)} items" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
                raise TaskError(f"the metric takes batches (inputs, targets), not {got}", path=self._source, hint=hint)
            with self._translate_errors("the model"):
                return model(batch[0]), batch[1]
        with self._translate_errors("predict"):
            arguments = self._predict(model, batch)
        if not isinstance(arguments, tuple):
            message = f"predict() must return the arguments of metric.update, a tuple, not {type(arguments).__name__}"
            raise TaskError(message, path=self._source)
        return arguments

    def _value_of(self, metric: Any) -> float:
        with self._translate_errors(f"{self._name}.compute"):
            value = metric.compute()
        if isinstance(value, bool | int | float):
            value = torch.tensor(float(value))
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            hint = "average it over classes or outputs, such as with average='macro'"
            raise TaskError(f"the metric must compute one number, not {got}", path=self._source, hint=hint)
        return float(value)

    @contextmanager
    def _translate_errors(self, where: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # boundary to user code
            if isinstance(error, CkptavgError) or is_out_of_memory(error):
                raise
            message = f"in {where}: {type(error).__name__}: {' '.join(str(error).split())}"
            raise TaskError(message, path=self._source, hint="-v shows the traceback") from error


@dataclass(frozen=True)
class Resampled:
    """`CorpusMetric.resampled` times the sign that makes larger better; ``corpus`` gives access to its states."""

    corpus: CorpusMetric
    sign: float

    def __call__(self, drawn: Sequence[int]) -> float:
        """Return the signed value over the batches ``drawn``."""
        return self.sign * self.corpus.resampled(drawn)


def _metrics(metric: Any) -> list[Any]:  # nested ones hold the states of a wrapper or a composition
    return [module for module in metric.modules() if is_torchmetric(module)]


def _states(metric: Any) -> list[Mapping[str, Any]]:
    """Copy the states of all metrics in ``metric``: `reset` empties lists in place, and a custom one may do more."""
    states = [{name: getattr(nested, name) for name in nested._reductions} for nested in _metrics(metric)]
    return [
        {name: list(value) if isinstance(value, list) else value.clone() for name, value in state.items()}
        for state in states
    ]


def _load(metric: Any, states: Sequence[Mapping[str, Any]], updates: int) -> None:
    for nested, state in zip(_metrics(metric), states, strict=True):
        nested.reset()
        for name, value in state.items():
            setattr(nested, name, value)
        nested._update_count = updates


def _merge_states(states: list[Any], reduce: Callable[[Any], Any] | None) -> Any:
    if isinstance(states[0], list):
        return [item for state in states for item in state]
    if getattr(reduce, "__name__", "") == "dim_zero_cat":
        return torch.cat(states)
    stacked = torch.stack(states)
    return stacked if reduce is None else reduce(stacked)
