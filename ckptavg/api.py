"""Python API: one function per strategy and per command, with the options of the command line as keywords."""

import inspect as signatures
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, Union

from ckptavg.checkpoints.inspection import facts, open_for_inspection
from ckptavg.declaration import Option, check_value, declared, docstring
from ckptavg.errors import UsageError, nearest
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.options import CHECK, EVAL, NOT_COMPARE, NOT_INSPECT, NOT_SWAG, Options
from ckptavg.options.comparison import ComparisonOptions
from ckptavg.options.follow import FOLLOW
from ckptavg.options.landscape import LandscapeOptions
from ckptavg.options.posterior import PosteriorOptions
from ckptavg.options.task import check_unscored
from ckptavg.pipeline import evaluation, logs, task_check, verification
from ckptavg.pipeline import run as run_pipeline
from ckptavg.pipeline.basin import find_basins
from ckptavg.pipeline.comparison import compare as run_comparison
from ckptavg.pipeline.follow import follow
from ckptavg.pipeline.landscape import landscape as find_landscape
from ckptavg.pipeline.swag import swag as run_swag
from ckptavg.pipeline.task_choice import with_task
from ckptavg.report.basin import Basins
from ckptavg.report.display import Report
from ckptavg.report.posterior import PosteriorResult
from ckptavg.report.result import Comparison, Evaluation, Inspection, Landscape, Result
from ckptavg.report.task_check import TaskCheck
from ckptavg.runtime.notebook import ProgressLine, in_notebook
from ckptavg.runtime.progress import Watch
from ckptavg.strategies import from_spec, name_of, specs, strategies
from ckptavg.tasks.objects import TaskObjects

PathLike = str | os.PathLike[str]
Paths = PathLike | Sequence[PathLike]
R = TypeVar("R", bound=Report | Basins)
_UNLOGGED = Options()


def run(ckpts: Paths, strategy: Strategy | str, *, watch: Watch | None = None, **options: Any) -> Result:
    """Learn coefficients with ``strategy``, write the average, and return the report.

    Args:
        ckpts: one or more directories of checkpoints, or checkpoints.
        strategy: such as ``"sewa:k=5"`` or ``ckptavg.strategies.sewa.SeWA(k=5)``.
        watch: progress callback ``(stage, done, total, metrics)``; in a notebook progress is printed without one.
        **options: the options of the command line, listed by ``help(ckptavg.swa)``.
    Raises:
        CkptavgError: with the message and exit code of the command line.
    """
    strategy = from_spec(strategy) if isinstance(strategy, str) else strategy
    name, without = name_of(strategy), () if strategy.follows else FOLLOW
    shared = _options(name, ckpts, options, required=not isinstance(strategy, PlainAverage), without=without)
    work = follow if shared.follow else run_pipeline
    return _watched(watch, lambda progress: work(strategy, _paths(ckpts), shared, progress), shared)


def compare(
    ckpts: Paths, strategies: str | Sequence[str] = (), *, watch: Watch | None = None, **options: Any
) -> Comparison:
    """Run several strategies, write the average of the winner, and return the report on all of them.

    Args:
        ckpts: one or more directories of checkpoints, or checkpoints.
        strategies: such as ``"swa,sewa:k=8"`` or ``["swa", "twa:on=train"]``; empty runs every one the task allows.
        watch: see `run`.
        **options: those of `run`, except never_worse and baselines; and select_by and write_all of ``ckptavg compare``.
    Raises:
        CkptavgError: with the message and exit code of the command line.
    """
    taken = [option for option in declared(ComparisonOptions) if option.name != "strategies"]
    own = keywords("compare", {o.name: options.pop(o.name) for o in taken if o.name in options}, taken)
    shared = _options("compare", ckpts, options, required=True, without=NOT_COMPARE)
    own["strategies"] = specs(strategies)
    return _watched(watch, lambda progress: run_comparison(_paths(ckpts), shared, progress, **own), shared)


def swag(ckpts: Paths = (), *, watch: Watch | None = None, **options: Any) -> PosteriorResult:
    """Write the mean of the candidates, and models drawn from a Gaussian around it; average their predictions.

    Args:
        ckpts: one or more directories of checkpoints, or checkpoints; none with ``from_``, a file of ``posterior``.
        watch: see `run`.
        **options: those of `run`, except adapter, rank and format; and those of ``ckptavg swag --help``.
    Raises:
        CkptavgError: with the message and exit code of the command line.
    """
    taken = declared(PosteriorOptions)
    own = keywords("swag", {o.name: options.pop(o.name) for o in taken if o.name in options}, taken)
    paths = _paths(ckpts) if ckpts or "from_" not in own else []
    shared = with_task(_parsed("swag", options, without=NOT_SWAG), paths, required=False)
    return _watched(watch, partial(run_swag, paths, shared, settings=PosteriorOptions(**own)), shared)


def landscape(ckpts: Paths, *, watch: Watch | None = None, **options: Any) -> Landscape:
    """Measure the loss around the candidates, write it as numbers and with ``mixtures`` as a picture, and return it.

    Args:
        ckpts: one or more directories of checkpoints, or checkpoints.
        watch: see `run`.
        **options: those of `run`, and mixtures, grid, examples, samples and hessian of ``ckptavg landscape --help``.
    Raises:
        CkptavgError: with the message and exit code of the command line.
    """
    taken = declared(LandscapeOptions)
    own = keywords("landscape", {o.name: options.pop(o.name) for o in taken if o.name in options}, taken)
    shared = _options("landscape", ckpts, {"output": "./", **options}, required=True, without=(*FOLLOW, "log_to"))
    return _watched(watch, lambda progress: find_landscape(_paths(ckpts), shared, progress, **own))


def evaluate(files: Paths, task: PathLike | None = None, *, watch: Watch | None = None, **options: Any) -> Evaluation:
    """Score each file on validation and test data, with the BatchNorm statistics stored in it.

    Args:
        files: one or more checkpoints, outputs of ckptavg, or directories of checkpoints.
        task: task file or module.
        watch: see `run`.
        **options: the options of ``ckptavg eval``; or the objects of a task, as for `run`.
    Raises:
        CkptavgError: with the message and exit code of the command line.
    """
    shared = _parsed("evaluate", {"task": task, **options}, only=EVAL)
    return _watched(watch, lambda progress: evaluation.evaluate(_paths(files), shared, progress))


def check(ckpts: Paths, *, watch: Watch | None = None, **options: Any) -> TaskCheck:
    """Run the task on the last checkpoint, and return what it does, what a search would cost, and what is wrong.

    Args:
        ckpts: one or more directories of checkpoints, or checkpoints.
        watch: see `run`.
        **options: the options of ``ckptavg check``; or the objects of a task, as for `run`.
    Raises:
        CkptavgError: with the message and exit code of the command line.
    """
    shared = with_task(_parsed("check", options, only=CHECK), _paths(ckpts), required=True)
    return _watched(watch, lambda progress: task_check.check_task(_paths(ckpts), shared, progress))


def inspect(
    ckpts: Paths, *, read_data: bool = False, basin: bool = False, watch: Watch | None = None, **options: Any
) -> Inspection:
    """List the candidates in training order, and the reason for each file left out; bad ones are among these.

    Args:
        ckpts: one or more directories of checkpoints, or checkpoints.
        read_data: read files to their ends too: checksums and NaN.
        basin: score midpoints between candidates too: do they lie in one basin?
        watch: see `run`.
        **options: key, component, step_from, include, exclude, start, stop, window, every and last; with ``basin``
            those of ``ckptavg inspect`` that define a score, or the objects of a task, as for `run`.
    """
    shared = _parsed("inspect", options, without=NOT_INSPECT)
    if not basin:
        check_unscored(vars(shared) | ({"task": "model"} if shared.objects else {}))
    with open_for_inspection(_paths(ckpts), shared, shared.key, read_data=read_data) as found:
        rows = [facts(checkpoint) for checkpoint in found.checkpoints]
    report = Inspection(layout=found.layout, candidates=rows, left_out=found.left_out, warnings=found.warnings)
    if not basin:
        return report
    scored = with_task(shared, _paths(ckpts), required=True)
    return replace(report, basin=_watched(watch, lambda progress: find_basins(_paths(ckpts), scored, progress)))


def verify(file: PathLike, sources: PathLike | None = None) -> verification.Verification:
    """Recompute the average recorded in the metadata of ``file`` from the files under ``sources``, and compare.

    Without ``sources``, those in the working directory are taken; if they are not there, only the data are compared
    with the digest in the metadata.

    Raises:
        CkptavgError: if ``file`` is not an output of ckptavg, or a source is missing or not the recorded one.
    """
    (path,) = _paths(file)
    return verification.verify(path, None if sources is None else _paths(sources)[0])


def _paths(paths: Any) -> list[Path]:
    listed: list[Any] = [paths] if isinstance(paths, str | os.PathLike) or not isinstance(paths, Iterable) else [*paths]
    if wrong := [path for path in listed if not isinstance(path, str | os.PathLike)]:
        raise UsageError(f"checkpoints must be paths, not {wrong[0]!r}")
    if not listed:
        raise UsageError("checkpoints must be at least one path, and the list is empty")
    return [Path(path) for path in listed]


def _watched(watch: Watch | None, work: Callable[[Watch | None], R], options: Options = _UNLOGGED) -> R:
    """Run ``work`` with a progress callback, and with the loggers of ``options``."""
    line = ProgressLine() if watch is None and in_notebook() else None
    try:
        with logs.opened(options, watch or line) as log:
            return log.finished(work(log.watch))
    finally:
        if line is not None:
            line.clear()


def _options(
    function: str, ckpts: Paths, options: Mapping[str, Any], *, required: bool, without: Sequence[str] = ()
) -> Options:
    return with_task(_parsed(function, options, without=without), _paths(ckpts), required=required)


def _parsed(
    function: str, options: Mapping[str, Any], *, only: Sequence[str] = (), without: Sequence[str] = ()
) -> Options:
    """Return the options of ``function``; those that are objects of a task make a `TaskObjects`."""
    taken = [option for option in _keywords(Options) if option.name not in without]
    if only:
        taken = [option for option in taken if option.name in (*only, *map(_name, declared(TaskObjects)))]
    values = keywords(function, options, taken)
    parts = {option.name for option in declared(TaskObjects)} - {option.name for option in declared(Options)}
    loaders = [values.get(name) for name in ("train", "val", "test")]
    if parts & values.keys() or not all(isinstance(loader, str | os.PathLike | None) for loader in loaders):
        names = (*map(_name, declared(TaskObjects)), "batch_size")
        values["objects"] = TaskObjects(**{name: values.pop(name) for name in names if name in values})
    return Options(**values)


def _name(option: Option) -> str:
    return option.name


def keywords(function: str, given: Mapping[str, Any], taken: Iterable[Option] | None = None) -> dict[str, Any]:
    """Return the keywords that were given; UsageError for one that ``function`` does not take, by default of `run`."""
    options = {option.name: option for option in (_keywords(Options) if taken is None else taken)}
    if unknown := [name for name in given if name not in options and name != "workers"]:
        hint = nearest(unknown[0], options, f"help(ckptavg.{function}) lists them")
        raise UsageError(f"{function}() has no option {unknown[0]!r}", hint=hint)
    values = {name: _value(options.get(name), value) for name, value in given.items()}
    for name, option in options.items():
        if name in values:
            check_value(option, values[name])
    return values


def _value(option: Option | None, value: Any) -> Any:
    """Return a value in the type that the command line would give it."""
    if type(value).__module__ == "torch":  # a dtype or a device; a plain average does not load it
        return str(value).removeprefix("torch.")
    if option and option.name == "task" and isinstance(value, os.PathLike):
        return os.fspath(value)
    if option and option.default == () and isinstance(value, str):
        return (value,)
    if isinstance(value, Integral) and not isinstance(value, int):  # of numpy
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


def _keywords(*classes: type) -> tuple[Option, ...]:
    """Return the declared options of ``classes``, and the objects of a task, whose names may be those of options."""
    options = {option.name: option for cls in classes for option in declared(cls)}
    for part in declared(TaskObjects):
        if same := options.get(part.name):
            text = replace(same.help, more=f"{same.help.more} {part.help.text}".strip())
            part = replace(same, kind=Union[same.kind, part.kind], help=text)  # noqa: UP007  # known only here
        options[part.name] = part
    return tuple(options.values())


def _function(name: str, strategy: type[Strategy]) -> Callable[..., Result]:
    """Return a strategy's function; its signature and docstring have the strategy's settings and the shared options."""
    own = {option.name for option in declared(strategy)}
    taken = [o for o in _keywords(strategy, Options) if strategy.follows or o.name not in FOLLOW]

    def call(ckpts: Paths, *, watch: Watch | None = None, **options: Any) -> Result:
        values = keywords(name, options, taken)
        settings = {key: values.pop(key) for key in own & values.keys()}
        return run(ckpts, strategy(**settings), watch=watch, **values)

    kind = signatures.Parameter.KEYWORD_ONLY
    parameters = [signatures.Parameter(o.name, kind, default=o.default, annotation=o.hint) for o in taken]
    first, watch, _ = signatures.signature(call).parameters.values()
    call.__signature__ = signatures.Signature([first, *parameters, watch])  # pyright: ignore[reportFunctionMemberAccess]
    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"{signatures.cleandoc(strategy.__doc__ or '')}\n\n{docstring(taken)}"
    return call


def __getattr__(name: str) -> Callable[..., Result]:
    if name in strategies():
        return _function(name, strategies()[name])
    raise AttributeError(f"module 'ckptavg.api' has no attribute {name!r}")
