"""Turn a function into a command: build its signature, run it and print the report."""

from __future__ import annotations

import inspect
import json as json_module
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, no_type_check

from ckptavg.cli.options import CKPTS, SHARED, named, parameter
from ckptavg.declaration import MAIN, PANELS, SEARCH, Option, declared
from ckptavg.options import Options, config_file
from ckptavg.options.search import SearchOptions
from ckptavg.runtime.command_line import CommandLine
from ckptavg.runtime.imports import quick_imports
from ckptavg.runtime.workers import joined

if TYPE_CHECKING:
    from ckptavg.report.result import Comparison, Landscape, Result
    from ckptavg.runtime.progress import Watch

Report: TypeAlias = "Result | Comparison | Landscape"
Decorator: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]
_FILES: Final = named("ckpts", Annotated[list[Path], CKPTS])


def takes(*options: Option, argument: inspect.Parameter | None = _FILES) -> Decorator:
    """Return a decorator that makes a function a command with `options`, and one argument or none."""
    parameters = [*([argument] if argument else []), *map(parameter, options)]

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
        return no_type_check(run)  # annotations are resolved; Typer's own lookup took a quarter of --help's time

    return decorate


def reports(
    own: Sequence[Option], *, without: Collection[str] = (), defaults: Mapping[str, Any] | None = None,
    searches: bool = True, argument: inspect.Parameter | None = _FILES,
) -> Decorator:  # fmt: skip
    """Return a decorator for a command with its `own` options, the shared ones except `without`, and a report's.

    If the command searches for nothing, all options of a search are listed together, which short help leaves out.
    """
    options = [option for option in SHARED.values() if option.name not in without]
    options = [replace(option, default=(defaults or {}).get(option.name, option.default)) for option in options]
    if not searches:
        ours = {option.name for option in declared(SearchOptions) if option.help.panel == MAIN}
        options = [replace(o, help=replace(o.help, panel=SEARCH)) if o.name in ours else o for o in options]
    options = sorted(options, key=lambda option: PANELS.index(option.help.panel))
    return takes(*own, *options, argument=argument)


def run_command(
    arguments: dict[str, Any], load: Callable[[], Callable[[list[Path], Options, Watch | None], Report]], *,
    needs_task: bool,
) -> None:  # fmt: skip
    """Run what `load` imports with the shared options of a command; print its report, and write it to ``--report``."""
    with quick_imports():
        from rich.text import Text

        from ckptavg.cli import job_summary, report_files, terminal
        from ckptavg.report import as_json, table
        from ckptavg.report.result import Result

    screen = terminal.Screen(quiet=arguments.pop("quiet"), verbose=arguments.pop("verbose"))
    json, files, paths = arguments.pop("json"), arguments.pop("report"), arguments.pop("ckpts")
    meeting = joined(arguments["device"], arguments["worker_timeout"])
    with meeting as workers, terminal.stdout_for_data(), screen.watching() as watch:
        with quick_imports():
            run = load()
            from ckptavg.pipeline import logs
            from ckptavg.pipeline.task_choice import with_task

        options = Options(**arguments, workers=workers)
        report_files.check(files, options)
        if options.wait_stable is not None and not options.follow:
            screen.print(f"waiting until no candidate has changed for {options.wait_stable:g} s")
        with logs.opened(options, watch) as log:
            done = run(paths, with_task(options, paths, required=needs_task), log.watch)
            done = log.finished(done, line := command_line(workers.world_size))
    if not workers.is_rank_zero:
        return
    screen.warn(done)
    screen.print(table.render(done))
    if isinstance(done, Result):
        screen.show_next_steps(done.next_steps)
    report_files.write(files, report := as_json.to_dict(done, line))
    if warning := job_summary.append(report):
        screen.print(Text(warning, style="yellow"))
    if json:
        print(json_module.dumps(report, indent=2, allow_nan=False))
    elif done.output:
        print(done.output.path)


def command_line(processes: int = 1) -> CommandLine:
    """Return the command of this process, with the configuration file of the working directory."""
    return CommandLine.current(config_file.read(Path()), processes)
