"""The application: one command per strategy, generated from its dataclass, and the commands that examine files."""

import importlib
from typing import Annotated

import typer

from ckptavg.cli import compare
from ckptavg.cli.help_page import Command, Group
from ckptavg.cli.strategy import command
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

_settings = {"cls": Command, "context_settings": app.info.context_settings}
for _name, _strategy in strategies().items():
    app.command(_name, rich_help_panel="Average", **_settings)(command(_name, _strategy))  # pyright: ignore
app.command("compare", rich_help_panel="Average", cls=Command)(compare.command)
for _name in ("inspect", "eval", "verify", "landscape", "env"):
    _module = importlib.import_module(f"ckptavg.cli.{_name}")
    app.command(_name, rich_help_panel="Examine", cls=Command)(_module.command)
for _name in ("init", "demo"):
    _module = importlib.import_module(f"ckptavg.cli.{_name}")
    app.command(_name, rich_help_panel="Start", cls=Command)(_module.command)


def _show_version(requested: bool) -> None:
    if requested:
        print("ckptavg", version.own())
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Turn the checkpoints of a training job into one better model."""
