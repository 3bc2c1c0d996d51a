"""Turn a function into a command: its signature, its options from the environment, its run."""

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
    """A keyword-only parameter of a command's signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_signature(
    run: Callable[..., None], name: str, doc: str, own: Sequence[inspect.Parameter], *,
    without: Collection[str] = (), defaults: Mapping[str, Any] | None = None,
) -> Callable[..., None]:  # fmt: skip
    """``run`` as a command: the checkpoints, its own options, and the shared ones but for some."""
    defaults = defaults or {}
    hints = _hints()
    shared = [
        parameter(one.name, hints[one.name], defaults.get(one.name, one.default))
        for one in inspect.signature(shared_options).parameters.values()
        if one.name not in without
    ]
    for one in (*own, *shared):
        _from_environment(one)
    parameters = [parameter("ckpts", Paths), *own, *shared]
    run.__name__ = name
    run.__doc__ = doc
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return no_type_check(run)  # no annotation is a string: what Typer would look for was a quarter of --help's time


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(shared_options, include_extras=True)


def _from_environment(one: inspect.Parameter) -> None:
    """Let ``CKPTAVG_NAME`` set the option; the task file has an order of its own."""
    info = get_args(one.annotation)[1]
    if info.envvar is None and one.name != "task":
        info.envvar, info.show_envvar = f"CKPTAVG_{one.name.upper()}", False


def run_command(
    arguments: dict[str, Any],
    work: Callable[[list[Path], Options, Watch | None], Report],
    *,
    needs_task: bool,
) -> None:
    """Do the work of a command with its shared arguments, and show and write its report."""
    from ckptavg.cli import terminal
    from ckptavg.report import as_json, table
    from ckptavg.report.result import Comparison

    shown = terminal.Screen(quiet=arguments.pop("quiet"), verbose=arguments.pop("verbose"))
    json, file = arguments.pop("json"), arguments.pop("report")
    paths = arguments.pop("ckpts")
    meeting = joined(arguments["device"], arguments["worker_timeout"])
    with meeting as workers, terminal.stdout_for_data(), shown.watching() as watch:
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
            shown.print(f"beginning when no candidate has changed for {options.wait_stable:g} s")
        done = work(paths, with_task(options, paths, required=needs_task), watch)
    if not workers.is_rank_zero:
        return
    result = done.result if isinstance(done, Comparison) else done
    shown.warn(result)
    shown.print(table.render(done))
    if file is not None:
        terminal.write_text(file, as_json.to_json(done) + "\n")
    if json:
        print(as_json.to_json(done))
    elif result.output:
        print(result.output.path)
