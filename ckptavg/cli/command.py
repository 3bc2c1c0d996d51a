"""Turn a function into a command: build its signature, run it and print the report."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, no_type_check

from ckptavg.cli.options import CKPTS, PRINTING, named, parameter
from ckptavg.declaration import PANELS, Option
from ckptavg.options import shared
from ckptavg.runtime.workers import joined

if TYPE_CHECKING:
    from ckptavg.options import Options
    from ckptavg.report.result import Comparison, Landscape, Result
    from ckptavg.runtime.progress import Watch

Report: TypeAlias = "Result | Comparison | Landscape"
_FILES: Final = named("ckpts", Annotated[list[Path], CKPTS])


def reporting(
    run: Callable[..., None], name: str, doc: str, own: Sequence[Option], *,
    without: Collection[str] = (), defaults: Mapping[str, Any] | None = None,
) -> Callable[..., None]:  # fmt: skip
    """Return `run` as a command with its `own` options, the shared options except `without`, and those of a report."""
    options = sorted((*shared(), *PRINTING), key=lambda option: PANELS.index(option.help.panel))
    return command(run, name, doc, [*own, *(o for o in options if o.name not in without)], defaults=defaults)


def command(
    run: Callable[..., None], name: str, doc: str, options: Sequence[Option], *,
    argument: inspect.Parameter | None = _FILES, defaults: Mapping[str, Any] | None = None,
) -> Callable[..., None]:  # fmt: skip
    """Return `run` as a command with `options`, and one argument or none."""
    parameters = [*([argument] if argument else []), *map(parameter, options)]
    changed = defaults or {}
    parameters = [p.replace(default=changed.get(p.name, p.default)) for p in parameters]

    run.__name__ = name
    run.__doc__ = doc
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return no_type_check(run)  # annotations are resolved; Typer's own lookup took a quarter of --help's time


def run_command(
    arguments: dict[str, Any], work: Callable[[list[Path], Options, Watch | None], Report], *, needs_task: bool
) -> None:
    """Run `work` with the shared options of a command, then print its report and write it to ``--report``."""
    from ckptavg.cli import terminal
    from ckptavg.report import as_json, table
    from ckptavg.report.result import Comparison

    screen = terminal.Screen(quiet=arguments.pop("quiet"), verbose=arguments.pop("verbose"))
    json, file = arguments.pop("json"), arguments.pop("report")
    paths = arguments.pop("ckpts")
    meeting = joined(arguments["device"], arguments["worker_timeout"])
    with meeting as workers, terminal.stdout_for_data(), screen.watching() as watch:
        from ckptavg.options import Options
        from ckptavg.pipeline.task_choice import with_task

        options = Options.of(**arguments, workers=workers)
        if file is not None:
            terminal.check_text(file)
        if options.wait_stable is not None:
            screen.print(f"waiting until no candidate has changed for {options.wait_stable:g} s")
        done = work(paths, with_task(options, paths, required=needs_task), watch)
    if not workers.is_rank_zero:
        return
    result = done.result if isinstance(done, Comparison) else done
    screen.warn(result)
    screen.print(table.render(done))
    if file is not None:
        terminal.write_text(file, as_json.to_json(done) + "\n")
    if json:
        print(as_json.to_json(done))
    elif result.output:
        print(result.output.path)
