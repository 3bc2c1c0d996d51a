"""A torchmetrics metric as a task's metric: one figure of the whole data, and of resamples of its batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from ckptavg.errors import CkptavgError, TaskError, is_out_of_memory

if TYPE_CHECKING:
    from torch import nn

_RTOL: Final = 1e-3  # two orders of adding float32 states differ by far less, also where they cancel to nearly 0
_ATOL: Final = 1e-6


def is_torchmetric(metric: object) -> bool:
    """Whether ``metric`` is an object of torchmetrics, told without importing it."""
    return (
        not isinstance(metric, type)
        and any(kind.__module__.split(".")[0] == "torchmetrics" for kind in type(metric).__mro__)
        and all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))
    )


def metric_goal(metric: Any) -> Literal["max", "min"] | None:
    """The direction that the metric declares with ``higher_is_better``; None where it leaves that open."""
    better = getattr(metric, "higher_is_better", None)
    return None if better is None else "max" if better else "min"


class CorpusMetric:
    """A torchmetrics metric over a split, whose states are also kept for each batch.

    The figure is the metric's own, from states that have seen all batches in order. For a resample, the states that
    each of its batches leaves in a fresh metric are merged as torchmetrics merges those of several processes: each by
    its ``dist_reduce_fx``, applied to the stacked tensors; lists are joined. `update` is called twice a batch for this.

    Args:
        metric: what the task file gives; a copy is used, on the device of its arguments.
        source: the task file, for errors.
        predict: the task's function from model and batch to the tuple of arguments of ``metric.update``; None takes
            batches as pairs (inputs, targets) and calls ``metric.update(model(inputs), targets)``.
    Raises:
        TaskError: if ``metric`` is a collection of several.
    """

    def __init__(
        self, metric: Any, *, source: str, predict: Callable[[nn.Module, Any], tuple[Any, ...]] | None = None
    ) -> None:
        if any(kind.__name__ == "MetricCollection" for kind in type(metric).__mro__):
            hint = "candidates are compared by one number: give one of its metrics"
            raise TaskError("metric is a MetricCollection", path=source, hint=hint)
        self._source = source
        self._name = type(metric).__name__
        self._predict = predict
        self._whole: Any = metric.clone()
        self._part: Any = metric.clone()
        self._merges = False
        self._told: list[dict[str, int]] = []
        self._told_batches = 0
        self.reset()

    def state_dict(self, *, everything: bool = False) -> dict[str, Any]:
        """For `restore`: the states of the batches since the last part, or of all; of lists, what is new in them."""
        if everything:
            self._told = []
        whole = [_state(metric) for metric in _metrics(self._whole)]
        lengths = [{name: len(state) for name, state in one.items() if isinstance(state, list)} for one in whole]
        for states, told in zip(whole, self._told, strict=False):
            for name, length in told.items():
                states[name] = states[name][length:]
        batches, self._told_batches = 0 if not self._told else self._told_batches, self.batches
        self._told = lengths
        return {"whole": whole, "batches": self._states[batches:]}

    def load_state_dict(self, part: Mapping[str, Any]) -> None:
        """Add the batches of a part."""
        self._states += part["batches"]
        for metric, states in zip(_metrics(self._whole), part["whole"], strict=True):
            for name, state in states.items():
                setattr(metric, name, getattr(metric, name) + state if isinstance(state, list) else state)
            metric._update_count = len(self._states)
            metric._computed = None
        self._whole.to(self._whole.device)
        self.state_dict()

    @property
    def batches(self) -> int:
        """How many were added since the last `reset`."""
        return len(self._states)

    def reset(self) -> None:
        """Forget all batches."""
        self._whole.reset()
        self._states: list[list[Mapping[str, Any]]] = []
        self._merges = False
        self._told = []

    def update(self, model: nn.Module, batch: Any) -> None:
        """Run the model on a batch and add what it gives.

        Raises:
            TaskError: if the batch is no pair and the task has no ``predict``, or model or metric fails.
        """
        import torch

        with torch.no_grad():
            arguments = self._arguments(model, batch)
            with self._blame(f"{self._name}.update"):
                device = next((value.device for value in arguments if isinstance(value, torch.Tensor)), None)
                for metric in (self._whole, self._part):
                    if device is not None and metric.device != device:
                        metric.to(device)
                self._part.reset()
                for metric in (self._whole, self._part):
                    metric.update(*arguments)
        self._states.append([_state(metric) for metric in _metrics(self._part)])

    def compute(self) -> float:
        """The figure of all batches so far, as the metric gives it: negate it where its goal is ``min``.

        Raises:
            TaskError: if there was no batch, or the figure is not one number.
        """
        if not self._states:
            raise TaskError("the metric has seen no batches", path=self._source)
        with self._blame(f"{self._name}.compute"):
            value = self._whole.compute()
        return self._number(value)

    def resampled(self, indices: Sequence[int]) -> float:
        """The figure of the batches ``indices``, in the order they were added; one may come several times.

        What torchmetrics warns of here, such as a resample without positives, is not shown.

        Raises:
            TaskError: if merging the states of all batches does not give what `compute` gives, or as `compute`.
        """
        if not indices:
            raise TaskError("a resample needs a batch", path=self._source)
        if not self._merges:
            merged, value = self._merged(range(self.batches)), self.compute()
            if not math.isclose(merged, value, rel_tol=_RTOL, abs_tol=_ATOL):
                raise TaskError(
                    f"the states of {self._name} cannot be merged: {merged} from its batches, {value} from all at once",
                    path=self._source,
                    hint="add_state(…, dist_reduce_fx=…) says how, such as 'sum'",
                )
            self._merges = True
        return self._merged(indices)

    def _merged(self, indices: Sequence[int]) -> float:
        with self._blame(f"{self._name}.compute"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for place, metric in enumerate(_metrics(self._part)):
                metric.reset()
                for name, reduce in metric._reductions.items():
                    states = [_to_device(metric.device, self._states[i][place][name]) for i in indices]
                    setattr(metric, name, _joined(states, reduce))
                metric._update_count = len(indices)
            value = self._part.compute()
        if not math.isfinite(number := self._number(value)):
            raise TaskError(f"the metric is {number}", path=self._source)
        return number

    def _arguments(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        if self._predict is None:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                hint = "define predict(model, batch) in the task file, returning the arguments of metric.update"
                got = f"{len(batch)} items" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
                raise TaskError(f"the metric takes batches (inputs, targets), not {got}", path=self._source, hint=hint)
            with self._blame("the model"):
                return model(batch[0]), batch[1]
        with self._blame("predict"):
            arguments = self._predict(model, batch)
        if not isinstance(arguments, tuple):
            got = type(arguments).__name__
            raise TaskError(
                f"predict() must return the arguments of metric.update, a tuple, not {got}", path=self._source
            )
        return arguments

    def _number(self, value: Any) -> float:
        import torch

        if isinstance(value, bool | int | float):
            value = torch.tensor(float(value))
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            hint = "give it an average over classes or outputs, such as average='macro'"
            raise TaskError(f"the metric must compute one number, not {got}", path=self._source, hint=hint)
        return float(value)

    @contextmanager
    def _blame(self, where: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # the boundary to code that is not ours
            if isinstance(error, CkptavgError) or is_out_of_memory(error):
                raise
            what = f"in {where}: {type(error).__name__}: {' '.join(str(error).split())}"
            raise TaskError(what, path=self._source, hint="-v shows the traceback") from error


@dataclass(frozen=True)
class Resampled:
    """`CorpusMetric.resampled` with the sign that makes larger better, and the metric, whose parts can be kept."""

    corpus: CorpusMetric
    sign: float

    def __call__(self, drawn: Sequence[int]) -> float:
        """The figure of the batches ``drawn``."""
        return self.sign * self.corpus.resampled(drawn)


def _metrics(metric: Any) -> list[Any]:
    """The metric and those within it, which hold the states of a wrapper or a composition."""
    return [module for module in metric.modules() if is_torchmetric(module)]


def _state(metric: Any) -> dict[str, Any]:
    """What the metric has accumulated; copied, for `reset` empties lists in place, and a metric's own may do more."""
    states = {name: getattr(metric, name) for name in metric._reductions}
    return {name: list(state) if isinstance(state, list) else state.clone() for name, state in states.items()}


def _to_device(device: Any, state: Any) -> Any:
    """A state that an earlier run left is on the CPU."""
    import torch

    if isinstance(state, list):
        return [_to_device(device, item) for item in state]
    return state.to(device) if isinstance(state, torch.Tensor) else state


def _joined(states: list[Any], reduce: Callable[[Any], Any] | None) -> Any:
    """The state that has seen what each of ``states`` has; None as ``reduce`` leaves tensors stacked."""
    import torch

    if isinstance(states[0], list):
        return [item for state in states for item in state]
    if getattr(reduce, "__name__", "") == "dim_zero_cat":
        return torch.cat(states)
    stacked = torch.stack(states)
    return stacked if reduce is None else reduce(stacked)
