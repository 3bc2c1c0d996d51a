"""A task from a Python file or module: the user's own functions, and one line of error when they fail."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ckptavg.errors import CkptavgError, TaskError, UsageError, is_out_of_memory
from ckptavg.objective import Split
from ckptavg.tasks.torch_metrics import CorpusMetric, is_torchmetric, metric_goal
from ckptavg.tasks.turns import of_worker, undivided


class PythonTask:
    """The functions of a task file; see the README for their names.

    Args:
        source: a path that ends in ``.py`` or has a directory in it, or the dotted name of a module.
    Raises:
        UsageError: if there is no such file or module.
        TaskError: if importing it fails, or a function it must have is missing.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._module = _import(source)
        for name in ("model", "loss"):
            self._function(name)
        if not self.has("val") and not self.has("train"):
            self._function("val_dataloader")
        self.metric: Callable[[nn.Module, Any], Tensor] | None = None
        self.corpus: Callable[[], CorpusMetric] | None = None
        self.whole = None
        metric: Any = getattr(self._module, "metric", None)
        if is_torchmetric(metric):
            self.corpus = lambda: CorpusMetric(metric, source=source, predict=self._predict())
            self.corpus()  # one of a kind that cannot be used is refused now
        elif metric is not None:
            metric = self._function("metric")
            self.metric = lambda model, batch: self._call("metric", metric, model, batch)
        self.metric_goal: str = self._goal(metric)
        self.metric_bounds = self._bounds()
        self._loss = self._function("loss")
        self._loaders: dict[Split, Any] = {}
        self._own: dict[Split, tuple[Any, Any]] = {}  # of `turns`; a worker has the same rank all the time

    def model(self) -> nn.Module:
        """See `Task.model`."""
        model = self._call("model", self._function("model"))
        if not isinstance(model, nn.Module):
            raise TaskError(f"model() must return a torch.nn.Module, not {type(model).__name__}", path=self.source)
        return model

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """See `Task.loss`."""
        loss = self._call("loss", self._loss, model, batch)
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            got = f"a {loss.dtype} tensor" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TaskError(f"loss() must return a floating-point tensor, not {got}", path=self.source)
        return loss

    def has(self, split: Split) -> bool:
        """See `Task.has`."""
        return callable(getattr(self._module, f"{split}_dataloader", None))

    def batches(self, split: Split) -> Iterator[Any]:
        """See `Task.batches`; a loader that is an iterator is made anew for each pass."""
        return self._read(split, self._loader(split))

    def turns(self, split: Split, rank: int, world: int) -> Iterator[tuple[Any, Sequence[int]]] | None:
        """See `ckptavg.feed.Feed`: for a DataLoader of a dataset with indices."""
        found = self._own.get(split) or of_worker(self._loader(split), rank, world)
        if found is None:
            return None
        loader, sizes = self._own[split] = found
        return ((batch, sizes.popleft()) for batch in self._read(split, loader))

    def _read(self, split: Split, loader: Any) -> Iterator[Any]:
        name = f"{split}_dataloader"
        with self._blame(name):
            batches = iter(loader)
        while True:
            with self._blame(name):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def examples(self, split: Split) -> int | None:
        """See `Task.examples`."""
        dataset = getattr(self._loader(split), "dataset", None) if self.has(split) else None
        return len(dataset) if hasattr(dataset, "__len__") else None  # pyright: ignore[reportArgumentType]

    def halve(self) -> bool:
        """See `Task.halve`: the sizes of batches are the user's."""
        return False

    def length(self, split: Split) -> int | None:
        """See `Task.length`."""
        loader = self._loader(split)
        try:
            return len(loader)
        except TypeError:  # an iterator, or a loader of an IterableDataset
            return None

    def _predict(self) -> Callable[[nn.Module, Any], Any] | None:
        """The task's function from a batch to what its torchmetrics metric is updated with."""
        if getattr(self._module, "predict", None) is None:
            return None
        predict = self._function("predict")
        return lambda model, batch: self._call("predict", predict, model, batch)

    def _goal(self, metric: Any) -> str:
        known = metric_goal(metric) if is_torchmetric(metric) else "max"
        goal = getattr(self._module, "metric_goal", known)
        if goal is None:
            what = f"does not say whether a larger {type(metric).__name__} is better"
            raise TaskError(what, path=self.source, hint='metric_goal = "max", or "min"')
        if goal not in ("max", "min"):
            raise TaskError(f"metric_goal must be 'max' or 'min', not {goal!r}", path=self.source)
        return goal

    def _bounds(self) -> tuple[float, float] | None:
        bounds = getattr(self._module, "metric_bounds", None)
        if bounds is None:
            return None
        try:
            low, high = map(float, bounds)
        except (TypeError, ValueError):
            low = high = float("nan")
        if not -float("inf") < low < high < float("inf"):
            raise TaskError(f"metric_bounds must be two numbers such as (0.0, 1.0), not {bounds!r}", path=self.source)
        return low, high

    def _loader(self, split: Split) -> Any:
        name = f"{split}_dataloader"
        loader = self._loaders.get(split)
        if loader is None:
            loader = self._call(name, self._function(name))
            loader = undivided(loader)
            if not isinstance(loader, Iterator):
                self._loaders[split] = loader
        return loader

    def _function(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name, None)
        if not callable(function):
            raise TaskError(
                f"has no function `{name}`",
                path=self.source,
                hint="`ckptavg init` writes a task file that has them all",
            )
        return function

    def _call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        with self._blame(name):
            return function(*args)

    @contextmanager
    def _blame(self, name: str) -> Generator[None]:
        """Turn whatever the task's code raises into one line that names the function and the place."""
        try:
            yield
        except (Exception, SystemExit) as error:  # the boundary to code that is not ours
            if isinstance(error, CkptavgError) or is_out_of_memory(error):
                raise
            raise _failed(self.source, name, error) from error


def _import(source: str) -> ModuleType:
    path = Path(source)
    try:
        if source.endswith(".py") or len(path.parts) > 1:
            if not path.is_file():
                raise UsageError(f"no such task file: {source}", hint="`ckptavg init` writes one")
            return _import_file(path.resolve())
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name == source.partition(".")[0]:
            raise UsageError(f"no task file or module is called {source}", hint="`ckptavg init` writes one") from error
        raise _failed(source, None, error) from error
    except (Exception, SystemExit) as error:  # the boundary to code that is not ours
        if isinstance(error, CkptavgError):
            raise
        raise _failed(source, None, error) from error


def _import_file(path: Path) -> ModuleType:
    """Import a file as ``python path`` would: its own directory first on the path, so its neighbours import."""
    sys.path.insert(0, str(path.parent))
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) != str(path):
        name = f"ckptavg_task_{path.stem}"  # the name is taken by another module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a data loader's worker processes unpickle by it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failed(source: str, function: str | None, error: BaseException) -> TaskError:
    """``task.py:12: in loss: ValueError: …``, the line being the innermost one of the task's own file."""
    name = Path(source).name
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == name]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).name == name:
        lines.append(error.lineno)
    where = f"{source}:{lines[-1]}" if lines else source
    lead = f"in {function}: " if function else "on import: "
    hint = "-v shows the traceback"
    if "more than 1 value per channel" in str(error):  # BatchNorm learns from batches here, also in the last one
        hint = "BatchNorm needs two examples or more in every batch: set drop_last=True in the loader"
    return TaskError(f"{lead}{type(error).__name__}: {error}", path=where, hint=hint)
