"""Task of Python objects: functions, a module and loaders instead of a task file."""

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Final, TypeAlias

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ckptavg.errors import UsageError
from ckptavg.filesystem.regular_file import is_file

Loader: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
_ARGUMENTS: Final = {
    **dict.fromkeys(("loss", "forward", "metric", "predict"), ("model", "batch")),
    "labels": ("batch",), "batch_size": ("batch",), "model": (), "train": (), "val": (), "test": (),
}  # fmt: skip
_LOADERS: Final = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class TaskObjects:
    """The parts of a task file as objects: ``val`` is its ``val_dataloader()``, the other names are the same.

    Raises:
        UsageError: naming the part that is missing or of the wrong kind.
    """

    model: Annotated[
        nn.Module | Callable[[], nn.Module] | None, "The module that was saved (copied), or a function that makes it."
    ] = None
    loss: Annotated[Callable[..., Tensor] | None, "loss(model, batch): a mean, or better one value per example."] = None
    forward: Annotated[
        Callable[..., Any] | None, "forward(model, batch), whose result loss, metric and predict get for the model."
    ] = None
    val: Annotated[Loader | None, "With model and loss: a DataLoader, list of batches or function making one."] = None
    train: Annotated[Loader | None, "With model and loss: like val."] = None
    test: Annotated[Loader | None, "With model and loss: like val."] = None
    metric: Annotated[Any, "metric(model, batch): one value per example, or several by name; or torchmetrics."] = None
    predict: Annotated[Callable[..., Any] | None, "predict(model, batch): probabilities of the classes."] = None
    labels: Annotated[Callable[..., Any] | None, "labels(batch), where predict() needs it."] = None
    metric_key: Annotated[str | None, "Name of the metric that decides."] = None
    metric_goal: Annotated[str | Mapping[str, str] | None, "'max' or 'min', or a dict of these by name."] = None
    metric_bounds: Annotated[tuple[float, float] | None, "Range of the metric, for aswa's early_reject."] = None
    batch_size: Callable[[Any], int] | int | None = None

    def __post_init__(self) -> None:
        needed = ("model", "loss", *(("val",) if self.train is None else ()))
        if lacking := " and ".join(name for name in needed if getattr(self, name) is None):
            given = ", ".join(name for name, value in vars(self).items() if value is not None)
            message = f"a task of objects needs model, loss and val: {given} given, {lacking} missing"
            raise UsageError(message, hint="model=make_model, loss=lambda model, batch: ..., val=loader")
        if not isinstance(self.model, nn.Module) and not callable(self.model):
            kind = type(self.model).__name__
            raise UsageError(f"model must be a torch.nn.Module or a function that returns one, not {kind}")
        for name in ("loss", "forward", "predict", "labels"):
            _check_function(name, getattr(self, name))
        for name, arguments in _ARGUMENTS.items():
            if callable(value := getattr(self, name)) and not isinstance(value, nn.Module | DataLoader | Dataset):
                _check_arguments(name, value, arguments)
        for name in _LOADERS:
            _check_loader(name, getattr(self, name))

    def __str__(self) -> str:
        """The file of the loss, for errors."""
        file = getattr(getattr(self.loss, "__code__", None), "co_filename", "")
        return Path(file).name if is_file(Path(file)) else "task"

    def namespace(self) -> SimpleNamespace:
        """Return the objects under the names of a task file."""
        parts = {name: value for name, value in vars(self).items() if value is not None}
        loaders = {f"{name}_dataloader": _function(parts.pop(name)) for name in _LOADERS if name in parts}
        model = partial(copy.deepcopy, self.model) if isinstance(self.model, nn.Module) else self.model
        return SimpleNamespace(**parts | loaders | {"model": model})


def _function(loader: Loader) -> Callable[[], Any]:
    return loader if callable(loader) else lambda: loader


def _check_function(name: str, value: Any) -> None:
    if isinstance(value, nn.Module):
        kind = type(value).__name__
        hint = f"{name}=lambda model, batch: {kind}(reduction='none')(model(batch[0]), batch[1])"
        raise UsageError(f"{name} must be a function of (model, batch), not the module {kind}", hint=hint)
    if value is not None and not callable(value):
        raise UsageError(f"{name} must be a function, not {type(value).__name__}")


def _check_arguments(name: str, function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        required = f"is called as {name}({', '.join(arguments)})"
        raise UsageError(f"{name} {required}, but the one given takes {signature}") from error


def _check_loader(name: str, loader: Any) -> None:
    kind, fix = type(loader).__name__, f"{name} takes a DataLoader, a list of batches, or a function that returns one"
    if isinstance(loader, Iterator):
        raise UsageError(f"{name} is an iterator ({kind}), which can be read only once", hint=fix)
    dataset = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    if dataset or type(loader).__module__.partition(".")[0] == "datasets":
        raise UsageError(f"{name} is a dataset, not its batches", hint=f"{name}=DataLoader({name}, batch_size=100)")
    if isinstance(loader, str | os.PathLike):
        message = f"{name} is a path, but with model and loss it must be batches"
        raise UsageError(message, hint=f"{fix}; data files need neither model nor loss")
    unclear = isinstance(loader, Tensor | Mapping | tuple)
    if unclear or not (
        loader is None or callable(loader) or isinstance(loader, Iterable) or hasattr(loader, "__iter__")
    ):
        raise UsageError(
            f"{name} must be batches, not {kind}", hint=f"{fix}: {name}=[(inputs, labels)]" if unclear else fix
        )
