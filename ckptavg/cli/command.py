"""Turn a function into a command: build its signature, bind environment variables, run it and print the report."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints, no_type_check

from ckptavg.runtime.workers import joined

if TYPE_CHECKING:
    from ckptavg.options import Options
    from ckptavg.runtime.progress import Watch
from ckptavg.cli.options import Paths, Report, shared_options


def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """Return a keyword-only parameter for a command's signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_signature(
    run: Callable[..., None], name: str, doc: str, own: Sequence[inspect.Parameter], *,
    without: Collection[str] = (), defaults: Mapping[str, Any] | None = None,
) -> Callable[..., None]:  # fmt: skip
    """Give `run` the signature of a command: CKPTS, its `own` options, and the shared options except `without`."""
    defaults = defaults or {}
    hints = _hints()
    shared = [
        parameter(option.name, hints[option.name], defaults.get(option.name, option.default))
        for option in inspect.signature(shared_options).parameters.values()
        if option.name not in without
    ]
    for option in (*own, *shared):
        _from_environment(option)
    parameters = [parameter("ckpts", Paths), *own, *shared]
    run.__name__ = name
    run.__doc__ = doc
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return no_type_check(run)  # annotations are resolved; Typer's own lookup took a quarter of --help's time


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(shared_options, include_extras=True)


def _from_environment(option: inspect.Parameter) -> None:
    """Let ``CKPTAVG_NAME`` set the option, except the task file, which `find_task` looks up."""
    info = get_args(option.annotation)[1]
    if info.envvar is None and option.name != "task":
        info.envvar, info.show_envvar = f"CKPTAVG_{option.name.upper()}", False


def run_command(
    arguments: dict[str, Any],
    work: Callable[[list[Path], Options, Watch | None], Report],
    *,
    needs_task: bool,
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
        from ckptavg.checkpoints.window import Window
        from ckptavg.options import Options
        from ckptavg.pipeline.task_choice import with_task

        window = Window(
            **{name: arguments.pop(name) for name in ("include", "exclude", "start", "stop", "every", "last")}
        )
        bits = arguments.pop("bits")
        options = Options(**arguments, bits=bits if bits == "auto" else int(bits), window=window, workers=workers)
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
