"""The application: one command a strategy, made from its dataclass, and the commands that look at files."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

import ckptavg
from ckptavg.cli import compare
from ckptavg.cli.strategy import command
from ckptavg.strategies import strategies

app = typer.Typer(
    help="Turn the checkpoints of a training job into one better model.",
    epilog="Examples:  ckptavg init  ·  ckptavg inspect ./ckpts  ·  ckptavg sewa ./ckpts --k 5",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _name, _strategy in strategies().items():
    app.command(_name, rich_help_panel="Average", context_settings=app.info.context_settings)(command(_name, _strategy))  # pyright: ignore
app.command("compare", rich_help_panel="Average")(compare.command)
for _name in ("inspect", "eval", "verify", "landscape", "env"):
    _module = importlib.import_module(f"ckptavg.cli.{_name}")
    app.command(_name, rich_help_panel="Look")(_module.command)
for _name in ("init", "demo"):
    _module = importlib.import_module(f"ckptavg.cli.{_name}")
    app.command(_name, rich_help_panel="Start")(_module.command)


def _show_version(asked: bool) -> None:
    if asked:
        print("ckptavg", ckptavg.__version__)
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Turn the checkpoints of a training job into one better model."""
