"""A strategy's command, generated from the fields of its dataclass and the options all strategies share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from ckptavg.cli.command import parameter, run_command, with_signature
from ckptavg.cli.options import option
from ckptavg.objective import Strategy


def command(name: str, strategy: type[Strategy]) -> Callable[..., None]:
    """The function behind ``ckptavg NAME``: its signature is the strategy's fields and the shared options."""
    hints = get_type_hints(strategy, include_extras=True)
    settings = list(fields(strategy))  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
    own = [parameter(one.name, _annotation(one.name, hints[one.name], one.default), one.default) for one in settings]

    def run(**arguments: Any) -> None:
        chosen = strategy(**{one.name: arguments.pop(one.name) for one in own})

        def work(*inputs: Any) -> Any:
            from ckptavg.pipeline import run

            paths, options, watch = inputs
            return run(paths, chosen, options, watch)

        run_command(arguments, work, needs_task=strategy.needs_task)

    return with_signature(run, name, (strategy.__doc__ or "").strip().splitlines()[0], own)


def _annotation(name: str, hint: Any, default: Any) -> Any:
    kind, text = get_args(hint)
    short = (f"--{name}", f"-{name}") if len(name) == 1 else ()
    if get_origin(kind) in (Union, UnionType) and "auto" in [
        word for part in get_args(kind) for word in get_args(part)
    ]:
        return Annotated[str, option("Strategy", text, *short, parser=_number_or_auto, metavar="INTEGER|auto")]
    names = (f"--{name.replace('_', '-')}",) if default is False else short  # no --no-… for a flag
    return Annotated[kind, option("Strategy", text, *names)]


def _number_or_auto(text: str) -> int | str:
    return "auto" if text == "auto" else int(text)
