"""Python API: one function per strategy, with its own settings and the shared options."""

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ckptavg.declaration import declared, docstring
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.options import Options
from ckptavg.options.landscape import LandscapeOptions
from ckptavg.pipeline import run as run_pipeline
from ckptavg.pipeline.comparison import compare as run_comparison
from ckptavg.pipeline.landscape import landscape as find_landscape
from ckptavg.pipeline.task_choice import with_task
from ckptavg.report.result import Comparison, Landscape, Result
from ckptavg.strategies import strategies

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def run(ckpts: Paths, strategy: Strategy, **options: Any) -> Result:
    """Learn coefficients with ``strategy``, write the average, and return the report.

    Args:
        ckpts: one or more directories of checkpoints, or checkpoints.
        strategy: such as ``ckptavg.strategies.sewa.SeWA(k=5)``.
        **options: the options of the command line, which the signature of ``ckptavg.swa`` lists.
    Raises:
        CkptavgError: with the message and exit code of the command line.
    """
    shared = _options(ckpts, options, required=not isinstance(strategy, PlainAverage))
    return run_pipeline(strategy, _paths(ckpts), shared)


def compare(ckpts: Paths, strategies: Sequence[str] = (), **options: Any) -> Comparison:
    """Run several strategies, write the average of the one that validates best, and return the report on all of them.

    Args:
        ckpts: one or more directories of checkpoints, or checkpoints.
        strategies: such as ``("swa", "sewa:k=8", "twa:on=train")``; empty runs every strategy the task allows.
        **options: those of `run`.
    Raises:
        CkptavgError: with the message and exit code of the command line.
    """
    return run_comparison(_paths(ckpts), _options(ckpts, options, required=True), names=strategies)


def landscape(ckpts: Paths, **options: Any) -> Landscape:
    """Measure the loss around the candidates, write it as numbers and with ``mixtures`` as a picture, and return it.

    Args:
        ckpts: one or more directories of checkpoints, or checkpoints.
        **options: those of `run`, and mixtures, grid, examples, samples and hessian of ``ckptavg landscape --help``.
    Raises:
        CkptavgError: with the message and exit code of the command line.
    """
    settings = {o.name: options.pop(o.name) for o in declared(LandscapeOptions) if o.name in options}
    shared = _options(ckpts, {"output": "./", **options}, required=True)
    return find_landscape(_paths(ckpts), shared, **settings)


def _paths(ckpts: Paths) -> list[Path]:
    return [Path(ckpts)] if isinstance(ckpts, str | os.PathLike) else [Path(path) for path in ckpts]


def _options(ckpts: Paths, options: dict[str, Any], *, required: bool) -> Options:
    if options.get("task") is not None:
        options["task"] = str(options["task"])
    return with_task(Options(**options), _paths(ckpts), required=required)


def _function(name: str, strategy: type[Strategy]) -> Callable[..., Result]:
    """Return a strategy's function; its signature and docstring have the strategy's settings and the shared options."""
    settings, parameters = declared(strategy), (*declared(strategy), *declared(Options))

    def call(ckpts: Paths, **options: Any) -> Result:
        own = {setting.name: options.pop(setting.name) for setting in settings if setting.name in options}
        return run(ckpts, strategy(**own), **options)

    ckpts = inspect.Parameter("ckpts", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Paths)
    kind = inspect.Parameter.KEYWORD_ONLY
    keywords = [inspect.Parameter(o.name, kind, default=o.default, annotation=o.hint) for o in parameters]
    call.__signature__ = inspect.Signature([ckpts, *keywords])  # pyright: ignore[reportFunctionMemberAccess]
    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"{inspect.cleandoc(strategy.__doc__ or '')}\n\n{docstring(parameters)}"
    return call


def __getattr__(name: str) -> Callable[..., Result]:
    if name in strategies():
        return _function(name, strategies()[name])
    raise AttributeError(f"module 'ckptavg.api' has no attribute {name!r}")
