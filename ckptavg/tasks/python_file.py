"""Task from a Python file or module: the user's functions, with each exception reported as a one-line error."""

import importlib
import importlib.util
import itertools
import operator
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from ckptavg.errors import CkptavgError, TaskError, UsageError, is_out_of_memory
from ckptavg.filesystem.regular_file import is_file
from ckptavg.runtime.seeds import preserved
from ckptavg.runtime.threads import affinity, processors, quota
from ckptavg.score import METRIC, Split
from ckptavg.tasks import Task, data_loader, probabilities
from ckptavg.tasks import batch as batches
from ckptavg.tasks.batch import Batch
from ckptavg.tasks.failure import task_error
from ckptavg.tasks.guard import Guard
from ckptavg.tasks.hugging_face.adapter import adapter_alone
from ckptavg.tasks.metric_settings import MetricSettings
from ckptavg.tasks.model_state import ModelState
from ckptavg.tasks.objects import TaskObjects
from ckptavg.tasks.shared_forward import USERS, SharedForward, checked_forward
from ckptavg.tasks.torch_metrics import CorpusMetric, metrics_by_name
from ckptavg.tasks.worker_sampler import rank_loader, without_distributed_sampler

_RUN_THE_MODEL: Final = ("forward", *USERS)
_BATCH_FUNCTIONS: Final = (*_RUN_THE_MODEL, "batch_size", "labels")


class PythonTask(Task):
    """Task whose functions come from a Python file or module, or are given; docs/reference/task-file.md names them.

    Args:
        given: a path that ends in ``.py`` or contains a ``/``, or the dotted name of a module, or the objects.
        timeout: time limit in seconds of the import and of each call of a task function; None for no limit.
    Raises:
        UsageError: if there is no such file or module.
        TaskError: if the import fails, or a required function is missing.
    """

    def __init__(self, given: str | TaskObjects, timeout: float | None = None) -> None:
        self.source = source = str(given)
        self._guard = Guard(timeout, [source])
        self.notes: list[str] = []  # on its loaders, for the report
        self.undone: dict[str, set[str]] = {}  # function → what it changed of the model
        self._at = ""  # the batch being used, for errors
        self._state: ModelState | None = None  # of the model that was run last
        with self._translate_errors(None, thorough=True):
            self._module: Any = _import(given) if isinstance(given, str) else given.namespace()
        self._model = self._function("model")
        self._loss = self._function("loss")
        self._shared = SharedForward()
        self._forward = checked_forward(self._module, source)
        if self._forward is not None:
            self.shared_forward = self._shared.one_batch
        stated = getattr(self._module, "batch_size", None)  # or a constant of the file
        self._batch_size = partial(self._call, "batch_size", stated) if callable(stated) else None
        if not self.has("val") and not self.has("train"):
            self._function("val_dataloader")
        metric: Any = getattr(self._module, "metric", None)
        has_predict = getattr(self._module, "predict", None) is not None
        predict = partial(self._call, "predict", self._function("predict")) if has_predict else None
        if named := metrics_by_name(metric):
            outputs = predict or (self._forward and partial(self._call, "predict", lambda output, _: output))
            outputs = outputs and partial(self._outputs, outputs)
            self.corpus = lambda: {name: CorpusMetric(m, source=source, predict=outputs) for name, m in named.items()}
            self.corpus()  # raises here if the metric cannot be used
        elif metric is not None:
            self.metric = partial(self._metric, self._function("metric"))
            name = getattr(metric, "__name__", METRIC).strip("_<>")  # metric = accuracy
            self.metric_name = METRIC if name in ("lambda", "loss", "") else name
        if predict is not None and not named:
            required = getattr(self._module, "metric_key", None) in probabilities.GOALS
            self.predict = metrics = probabilities.ProbabilityMetrics(
                predict, self._labels, source, lambda: self._where, self.notes, required=required
            )
            self.probabilities = metrics.probabilities
        fixed = [*named] or [*probabilities.GOALS] * (self.predict is not None)
        settings = MetricSettings(self._module, source, fixed, own=self.metric is not None)
        self.metric_key, self.metric_bounds = settings.key, settings.bounds()
        self.metric_goal = settings.goal(named)
        self._loaders: dict[Split, Any] = {}
        self._rank_loaders: dict[Split, tuple[Any, Any]] = {}  # of `turns`, cached: a process's rank does not change

    def model(self) -> nn.Module:
        """See `Task.model`; a PEFT model stands for its adapter."""
        model = self._call("model", self._model)
        if not isinstance(model, nn.Module):
            raise TaskError(f"model() must return a torch.nn.Module, not {type(model).__name__}", path=self.source)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor):
                lazy = f"its {name} has no shape yet: run one batch first"
                raise TaskError(f"model() must return an initialized model, but {lazy}", path=self.source)
        return adapter_alone(model)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """See `Task.loss`."""
        if not torch.is_grad_enabled() and (self.metric or self.predict or self.corpus):
            batch = batches.copied(batch)  # the loss may change it, and others get it too
        loss = self._call("loss", self._loss, model, batch)
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            got = f"a {loss.dtype} tensor" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TaskError(f"loss() must return a floating-point tensor, not {got}{self._where}", path=self.source)
        return loss

    def _metric(self, function: Callable[..., Any], model: nn.Module, batch: Any) -> Any:
        value = self._call("metric", function, model, batch)
        if value is None:
            message = f"metric() must return a number or one per example, not None{self._where}"
            raise TaskError(message, path=self.source)
        return value

    def _outputs(self, predict: Callable[..., Any], model: nn.Module, batch: Any) -> Any:
        outputs = predict(model, batch)
        is_pair = isinstance(outputs, Tensor) and (outputs.ndim == 2 or self._forward is not None)
        return (outputs, self._labels(batch)) if is_pair else outputs

    def _labels(self, batch: Any) -> Any:
        hook = partial(self._call, "labels", f) if callable(f := getattr(self._module, "labels", None)) else None
        return probabilities.labels_of(batch, hook, self.source, self._where)

    def has(self, split: Split) -> bool:
        """See `Task.has`."""
        return callable(getattr(self._module, f"{split}_dataloader", None))

    def batches(self, split: Split) -> Iterator[Any]:
        """See `Task.batches`; a loader that is an iterator is created again for each pass."""
        return self._iterate(split)

    def sized_batches(self, split: Split) -> Iterator[Batch]:
        """See `Task.sized_batches`; ``batch_size(batch)`` of the task file comes first, then the loader's setting."""
        loader, counted = self._loader(split), 0
        with self._translate_errors(f"{split}_dataloader"):
            sizes = data_loader.Sizes(loader)
        for batch in self.batches(split):
            size = self._size(batch, *sizes.expected(counted))
            yield Batch(batch, size)
            counted += size
        if (mismatch := sizes.mismatch(counted)) and (note := f"{split}_dataloader(): {mismatch}"):
            self.notes += [note] if note not in self.notes else []

    def turns(self, split: Split, rank: int, world: int) -> Iterator[tuple[Any, Sequence[int]]] | None:
        """Iterate over this rank's batches and the batch sizes of all ranks; None unless the loader draws indices."""
        rank_batches = self._rank_loaders.get(split) or rank_loader(self._loader(split), rank, world)
        if rank_batches is None or self._batch_size is not None:
            return None  # numbers of indices are the sizes there
        loader, sizes = self._rank_loaders[split] = rank_batches
        return ((batch, sizes.popleft()) for batch in self._iterate(split, loader, itertools.count(rank + 1, world)))

    def _iterate(self, split: Split, own: Any = None, numbers: Iterable[int] | None = None) -> Iterator[Any]:
        """Iterate over the split's loader, or over ``own``, which shares its sampler."""
        name, whole = f"{split}_dataloader", self._loader(split)
        self._at = ""
        with self._translate_errors(name, thorough=True):
            for loader in (whole,) if own is None else (whole, own):
                data_loader.restart(loader)
            source = iter(whole if own is None else own)
        for number in numbers or itertools.count(1):
            self._at = f"batch {number} of {name}"
            with self._translate_errors(name):
                try:
                    batch = next(source)
                except StopIteration:
                    return
                except Exception:
                    # the traceback keeps a DataLoader's iterator alive, and until it is freed torch's SIGCHLD handler
                    # raises errors about a dead worker in unrelated code, or in this call
                    with suppress(AttributeError, RuntimeError):
                        source._shutdown_workers()  # pyright: ignore
                    raise
            yield batch

    def _size(self, batch: Any, expected: int | None, exactly: bool) -> int:
        if self._batch_size is None:
            try:
                return batches.size(batch, expected, exactly=exactly)
            except TaskError as error:
                raise TaskError(f"{error}{self._where}", path=self.source, hint=error.hint) from error
        size = self._batch_size(batch)
        try:
            return operator.index(size)
        except TypeError as error:
            message = f"batch_size() must return a number of examples, not {size!r}{self._where}"
            raise TaskError(message, path=self.source) from error

    def examples(self, split: Split) -> int | None:
        """See `Task.examples`."""
        dataset = getattr(self._loader(split), "dataset", None) if self.has(split) else None
        return len(dataset) if hasattr(dataset, "__len__") else None  # pyright: ignore[reportArgumentType]

    def length(self, split: Split) -> int | None:
        """See `Task.length`."""
        loader = self._loader(split)
        with self._translate_errors(f"{split}_dataloader"):
            try:
                return len(loader)
            except TypeError:  # an iterator, or a loader of an IterableDataset
                return None

    def _loader(self, split: Split) -> Any:
        name = f"{split}_dataloader"
        loader = self._loaders.get(split)
        if loader is None:
            with preserved():  # the first pass must draw the same random numbers as later ones
                loader = self._call(name, self._function(name))
            # torch itself warns if num_workers exceeds the affinity mask
            if isinstance(loader, DataLoader) and processors() < loader.num_workers <= affinity():
                excess = f"{name}() has num_workers={loader.num_workers}, and the CPU quota is {quota():g}"
                self.notes.append(f"{excess}: use at most {processors()}")
            loader = without_distributed_sampler(loader)
            if not isinstance(loader, Iterator):
                self._loaders[split] = loader
        return loader

    def _function(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name, None)
        if not callable(function):
            hint = "`ckptavg init` writes a task file that has them all"
            raise TaskError(f"has no function `{name}`", path=self.source, hint=hint)
        return function

    def _call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        if name not in _RUN_THE_MODEL:
            with self._translate_errors(name, thorough=name not in _BATCH_FUNCTIONS):
                return function(*args)
        (model, batch), forward = args, self._forward
        if forward is not None and name in USERS:
            output = self._shared(lambda: self._call("forward", forward, model, batches.copied(batch)))
            with self._translate_errors(name), self._shared.unchanged(output, name, self.source):
                return function(output, batch)
        if self._state is None or self._state.model is not model:
            self._state = ModelState(model)
        with self._translate_errors(name), self._state.restored(self.undone.setdefault(name, set())):
            return function(*args)

    @property
    def _where(self) -> str:
        return f", for {self._at}" if self._at else ""

    @contextmanager
    def _translate_errors(self, name: str | None, *, thorough: bool = False) -> Generator[None]:
        """Turn exceptions of task code in a `Guard` into one-line errors with the function (None: the import)."""
        try:
            with self._guard.inside(thorough=thorough):
                yield
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # boundary to user code
            if isinstance(error, CkptavgError) or is_out_of_memory(error):
                raise
            at = self._at if name in _BATCH_FUNCTIONS or (name and self._at.endswith(name)) else ""
            raise task_error(self.source, name, at, error, self._guard.seconds) from error


def _import(source: str) -> ModuleType:
    if source.endswith(".py") or "/" in source:
        if not is_file(Path(source)):
            raise UsageError(f"no such task file: {source}", hint=f"`ckptavg init {source}` writes one")
        return _import_file(Path(source).resolve())
    unknown = UsageError(f"no task file or module is called {source}", hint="`ckptavg init` writes one")
    if not all(map(str.isidentifier, source.split("."))):
        raise unknown
    with suppress(OSError):  # the directory was removed
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name == source.partition(".")[0]:
            raise unknown from error
        raise


def _import_file(path: Path) -> ModuleType:
    """Import a file as ``python path`` would: with its directory first on sys.path, so sibling modules import."""
    sys.path.insert(0, str(path.parent))
    loaded = sys.modules.get(name := path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) != str(path):
        name = f"ckptavg_task_{path.stem}"  # the name is taken by another module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # DataLoader worker processes unpickle objects by this name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
