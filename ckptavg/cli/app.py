"""The application: one command per strategy, generated from its dataclass, and the commands that examine files."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ckptavg.cli.command import reports, run_command
from ckptavg.cli.help_page import Command, Group
from ckptavg.cli.options import SHARED
from ckptavg.declaration import declared
from ckptavg.errors import UsageError
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.options import config_file
from ckptavg.options.follow import FOLLOW
from ckptavg.runtime import version
from ckptavg.strategies import strategies

app = typer.Typer(
    help="Turn the checkpoints of a training job into one better model.",
    epilog="Examples:  ckptavg init  ·  ckptavg inspect ./ckpts  ·  ckptavg sewa ./ckpts --k 5",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_OTHERS: Final = {
    "Average": ("swag", "compare"),
    "Examine": ("inspect", "check", "eval", "verify", "landscape", "report", "env"),
    "Start": ("init", "demo"),
}  # fmt: skip


def _command(strategy: type[Strategy]) -> Callable[..., None]:
    """Return the function behind ``ckptavg NAME``: main settings come first, and each solver's settings together."""
    settings = sorted(declared(strategy), key=lambda setting: setting.help.panel)

    def run(**arguments: Any) -> None:
        chosen = strategy(**{setting.name: arguments.pop(setting.name) for setting in settings})

        def load() -> Any:  # torch, once signals are handled
            from ckptavg.pipeline import run
            from ckptavg.pipeline.follow import follow

            return partial(follow if arguments.get("follow") else run, chosen)

        run_command(arguments, load, needs_task=not issubclass(strategy, PlainAverage))

    run.__doc__ = (strategy.__doc__ or "").strip().splitlines()[0]
    without = () if strategy.follows else FOLLOW
    return reports(settings, without=without, searches=not issubclass(strategy, PlainAverage))(run)


_settings = {"cls": Command, "context_settings": app.info.context_settings}
for _name, _strategy in strategies().items():
    app.command(_name, rich_help_panel="Average", **_settings)(_command(_strategy))  # pyright: ignore
for _panel, _names in _OTHERS.items():
    for _name in _names:
        _module = importlib.import_module(f"ckptavg.cli.{_name}")
        app.command(_name, rich_help_panel=_panel, cls=Command)(_module.command)


def _show_version(requested: bool) -> None:
    if requested:
        print("ckptavg", version.own())
        raise typer.Exit


def configured() -> dict[str, dict[str, Any]]:
    """Return the options of the configuration file as defaults: command → option → value."""
    values = config_file.read(Path())
    options_of = {
        str(command.name): set(command.callback.__annotations__) - {"task"}  # pyright: ignore  # `find_task` looks it up
        for command in app.registered_commands
    }
    if unknown := values.keys() - {"task"} - set().union(*options_of.values()):
        raise UsageError(f"{config_file.NAMES}: unknown options: {', '.join(sorted(unknown))}")
    repeated = values.keys() & {option.name for option in SHARED.values() if option.default == ()}
    values |= {name: values[name].split(",") for name in repeated}
    return {name: {key: values[key] for key in values.keys() & options} for name, options in options_of.items()}


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Turn the checkpoints of a training job into one better model."""
