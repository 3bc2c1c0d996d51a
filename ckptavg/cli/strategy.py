"""A strategy's command, generated from the fields of its dataclass and the options all strategies share."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from ckptavg.objective import Strategy


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


Paths = Annotated[
    list[Path],
    typer.Argument(metavar="CKPTS", help="A directory of checkpoints, several, or the checkpoints themselves."),
]
Include = Annotated[str | None, _option("Candidates", "Only checkpoints whose name matches this glob.")]
Exclude = Annotated[str | None, _option("Candidates", "No checkpoints whose name matches this glob.")]
Start = Annotated[int | None, _option("Candidates", "From this training step on.")]
Stop = Annotated[int | None, _option("Candidates", "Up to this training step.")]
Every = Annotated[int | None, _option("Candidates", "Every N-th, counted back from the last.")]
LastN = Annotated[int | None, _option("Candidates", "The last N.", "--last")]
Key = Annotated[str | None, _option("Candidates", "The part of each file that is the model, such as state_dict_ema.")]
TaskFile = Annotated[
    str | None,
    _option("Run", "Python file or module: model, loss, data. Else ./task.py.", metavar="PATH", envvar="CKPTAVG_TASK"),
]
Device = Annotated[str, _option("Run", "auto, cpu, cuda, cuda:1, mps.")]
Seed = Annotated[int, _option("Run", "Of everything random.")]
Json = Annotated[bool, _option("Report", "Print the report as JSON on stdout.", "--json")]
Quiet = Annotated[bool, _option("Report", "Only errors and the result.", "-q", "--quiet")]
Verbose = Annotated[bool, _option("Report", "More detail; tracebacks.", "-v", "--verbose")]

Output = Annotated[
    str, _option("Output", "The file to write; a directory/ gets model.safetensors.", "-o", "--output", metavar="PATH")
]
Force = Annotated[bool, _option("Output", "Replace an existing output.", "--force")]
Dtype = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"] | None,
    _option("Output", "Of the output; default the candidates' own."),
]
NeverWorse = Annotated[
    bool, _option("Output", "Write the best single candidate where it scores higher.", "--never-worse")
]
DryRun = Annotated[bool, _option("Run", "Say what would be done, and do nothing.", "--dry-run")]
Baselines = Annotated[bool, _option("Report", "Score last, SWA and LAWA for comparison.")]
ReportFile = Annotated[Path | None, _option("Report", "Write the report to a file too.", metavar="FILE.json")]


def _shared(
    *,
    output: Output = "averaged.safetensors",
    force: Force = False,
    dtype: Dtype = None,
    never_worse: NeverWorse = False,
    include: Include = None,
    exclude: Exclude = None,
    start: Start = None,
    stop: Stop = None,
    every: Every = None,
    last: LastN = None,
    key: Key = None,
    task: TaskFile = None,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    baselines: Baselines = True,
    json: Json = False,
    report: ReportFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The options of every strategy; only its signature is used."""


def command(name: str, strategy: type[Strategy]) -> Callable[..., None]:
    """The function behind ``ckptavg NAME``: its signature is the strategy's fields and the shared options."""
    hints = get_type_hints(strategy, include_extras=True)
    settings: list[inspect.Parameter] = []
    for setting in fields(strategy):  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
        kind, text = get_args(hints[setting.name])
        names = (f"--{setting.name.replace('_', '-')}",) if setting.default is False else ()  # no --no-… for a flag
        option = _option("Strategy", text, *names, envvar=f"CKPTAVG_{setting.name.upper()}", show_envvar=False)
        settings.append(_parameter(setting.name, Annotated[kind, option], setting.default))
    given = inspect.Parameter("ckpts", inspect.Parameter.KEYWORD_ONLY, annotation=Paths)
    shared_hints = get_type_hints(_shared, include_extras=True)
    shared = [
        _parameter(parameter.name, shared_hints[parameter.name], parameter.default)
        for parameter in inspect.signature(_shared).parameters.values()
    ]
    parameters = [given, *settings, *shared]

    def run(**arguments: Any) -> None:
        chosen = {setting.name: arguments.pop(setting.name) for setting in settings}
        _run(strategy(**chosen), arguments)

    run.__name__ = name
    run.__doc__ = (strategy.__doc__ or "").strip().splitlines()[0]
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _run(strategy: Strategy, arguments: dict[str, Any]) -> None:
    from ckptavg.cli import terminal
    from ckptavg.report import as_json, table

    shown = terminal.Screen(quiet=arguments.pop("quiet"), verbose=arguments.pop("verbose"))
    json, file = arguments.pop("json"), arguments.pop("report")
    paths = arguments.pop("ckpts")
    with redirect_stdout(sys.stderr), shown.watching() as watch:  # a task that prints must not spoil stdout
        from ckptavg.pipeline import Options, run
        from ckptavg.tasks.find import find
        from ckptavg.window import Window

        window = Window(
            **{name: arguments.pop(name) for name in ("include", "exclude", "start", "stop", "every", "last")}
        )
        task = find(arguments.pop("task"), paths, required=strategy.needs_task)
        result = run(paths, strategy, Options(**arguments, window=window, task=task), watch)
    shown.warn(result)
    shown.print(table.render(result))
    if file is not None:
        terminal.write_text(file, as_json.to_json(result) + "\n")
    if json:
        print(as_json.to_json(result))
    elif result.output:
        print(result.output.path)
