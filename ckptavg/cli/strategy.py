"""Generate a strategy's command from the fields of its dataclass and the options that all strategies share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from ckptavg.cli.command import parameter, run_command, with_signature
from ckptavg.cli.options import MAIN, option
from ckptavg.objective import Strategy


def command(name: str, strategy: type[Strategy]) -> Callable[..., None]:
    """Return the function behind ``ckptavg NAME``; its signature is the strategy's fields and the shared options."""
    hints = get_type_hints(strategy, include_extras=True)
    settings = list(fields(strategy))  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
    settings.sort(key=lambda setting: _panel(hints[setting.name]))
    own = [
        parameter(setting.name, _annotation(setting.name, hints[setting.name], setting.default), setting.default)
        for setting in settings
    ]

    def run(**arguments: Any) -> None:
        chosen = strategy(**{setting.name: arguments.pop(setting.name) for setting in own})

        def work(*inputs: Any) -> Any:
            from ckptavg.pipeline import run

            paths, options, watch = inputs
            return run(paths, chosen, options, watch)

        run_command(arguments, work, needs_task=strategy.needs_task)

    return with_signature(run, name, (strategy.__doc__ or "").strip().splitlines()[0], own)


def _annotation(name: str, hint: Any, default: Any) -> Any:
    """Return the Typer annotation of a setting from ``Annotated[TYPE, HELP]`` or ``Annotated[TYPE, HELP, PANEL]``."""
    kind, text, *panel = get_args(hint)
    heading = f"Advanced: {panel[0]}" if panel else MAIN
    short = (f"--{name}", f"-{name}") if len(name) == 1 else ()
    if get_origin(kind) in (Union, UnionType) and "auto" in [
        word for part in get_args(kind) for word in get_args(part)
    ]:
        return Annotated[str, option(heading, text, *short, parser=_number_or_auto, metavar="N|auto")]
    names = (f"--{name.replace('_', '-')}",) if default is False else short  # a flag that is off has no --no-NAME
    return Annotated[kind, option(heading, text, *names)]


def _panel(hint: Any) -> str:
    """Return the panel of a setting, which sorts main settings first and each solver's settings together."""
    return "".join(get_args(hint)[2:])


def _number_or_auto(text: str) -> int | str:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError as error:
        raise typer.BadParameter(f"must be a whole number or auto, not {text!r}") from error
