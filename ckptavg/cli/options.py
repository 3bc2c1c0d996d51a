"""Declared options as parameters of a Typer command."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Final, Union, get_args, get_origin

import typer

from ckptavg.declaration import RUN, Help, Option, declared
from ckptavg.options import Options

CKPTS: Final = typer.Argument(metavar="CKPTS", help="Checkpoint directories, or single checkpoints.", readable=False)
_NARROW: Final = 19  # columns of a list of choices that fits any terminal
PRINTING: Final = (
    Option("json", bool, False, Help(RUN, "Print the report as JSON on stdout.")),
    Option("report", Sequence[str], (), Help(
        RUN, "Also write the report to a file: .html, .md or .json.",
        "A page (.html) needs the extra `plot`; a pipe and a name without suffix get JSON; may be repeated.", "FILE")),
    Option("quiet", bool, False, Help(RUN, "Print only errors and the result.", short="-q")),
    Option("verbose", bool, False, Help(RUN, "Print more detail, and tracebacks.", short="-v")),
)  # fmt: skip
NO_REPORT: Final = tuple(option for option in PRINTING if option.name != "report")
SHARED: Final = {option.name: option for option in (*declared(Options), *PRINTING)}


def parameter(option: Option) -> inspect.Parameter:
    """Return the parameter of a command's signature for an option.

    ``CKPTAVG_NAME`` in the environment sets it too, but for the task file, which `find_task` looks up.
    """
    kind: Any = option.kind
    more: dict[str, Any] = {"metavar": option.help.metavar}
    if option.default == ():
        kind = list[str]
    elif get_origin(kind) is Union and str in get_args(kind):  # Path | str
        kind = str
    elif get_origin(kind) is Union:  # int | Literal["auto"]
        number = float if float in get_args(kind) else int
        kind, more = str, {"parser": partial(_number_or_auto, number), "metavar": "N|auto"}
    elif not all(isinstance(choice, str) for choice in option.choices):  # Typer takes words only
        kind, more = str, {"parser": partial(_choice, option)}
    if option.choices:  # between spaces, long lists are wrapped between the words
        metavar = f"<{'|'.join(map(str, option.choices))}>"
        more["metavar"] = metavar if len(metavar) <= _NARROW else metavar.replace("|", " | ")
    if option.default is None:
        kind = kind | None
    short = f"-{option.name}" if len(option.name) == 1 else option.help.short
    info = typer.Option(
        # Typer 0.26 to 0.28 take a metavar such as KEY for the name if there is none; with it a flag has no --no-NAME
        *([short] if short else []), *([] if option.default is True else [option.flag]),
        help=option.help.text,
        rich_help_panel=f"Advanced: {option.help.panel}" if option.help.panel else None,  # "Options", the first one
        envvar=None if option.name == "task" else f"CKPTAVG_{option.name.upper()}",
        show_envvar=False, readable=False, **more,
    )  # fmt: skip
    return named(option.name, Annotated[kind, info], option.default)


def named(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """Return a keyword-only parameter."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _choice(option: Option, text: str) -> Any:
    """Return the choice that a text stands for; any other text is refused where the option is declared."""
    return {str(choice): choice for choice in option.choices}.get(text, text)


def _number_or_auto(number: type[int] | type[float], text: str) -> float | str:
    try:
        return "auto" if text == "auto" else number(text)
    except ValueError as error:
        words = "a whole number" if number is int else "a number"
        raise typer.BadParameter(f"must be {words} or auto, not {text!r}") from error
