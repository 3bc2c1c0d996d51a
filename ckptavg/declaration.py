"""The declaration of an option: the command line, the Python signatures and the documentation are made from it.

An option is a field ``name: Annotated[TYPE, Help(panel, text)] = default`` of a frozen dataclass, whose
``__post_init__`` calls `check`. A strategy may write ``Annotated[TYPE, "text"]``, with its panel, the solver that uses
it, as a second text, and other solvers that do as further ones.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ckptavg.errors import UsageError

MAIN: Final = ""
CANDIDATES: Final = "candidates"
SCORING: Final = "scoring"
SEARCH: Final = "search"
OUTPUT: Final = "output"
WORKERS: Final = "several processes (torchrun)"
RUN: Final = "run and report"
PANELS: Final = (MAIN, CANDIDATES, SCORING, SEARCH, OUTPUT, WORKERS, RUN)
"""Headings of a help page, in its order."""


class Limit(NamedTuple):
    """The values that an option may have: a test, and its words in "must be ..."."""

    holds: Callable[[Any], bool]
    text: str


AT_LEAST_1: Final = Limit(lambda value: value >= 1, "at least 1")
POSITIVE: Final = Limit(lambda value: 0 < value < math.inf, "greater than 0")


@dataclass(frozen=True)
class Help:
    """The help of an option, and the values that it may have.

    Attributes:
        panel: the heading of the help page under which it is listed, of `PANELS`.
        text: one line for the help page.
        more: further sentences for docs/reference/options.md and Python docstrings.
        metavar: the name of its value on the help page.
        short: a second, short flag.
        limit: the values it may have; those of a ``Literal`` are known from the type.
        changes_measurements: False if a journal can be resumed with another value, because no score, loss or gradient
            depends on it, or because what does depend on it is compared instead.
        solvers: the panels of a strategy's solvers that use it; others refuse it.
    """

    panel: str
    text: str
    more: str = ""
    metavar: str | None = None
    short: str = ""
    limit: Limit | None = None
    changes_measurements: bool = True
    solvers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """A declared field: its name, its type without None, its default and its `Help`."""

    name: str
    kind: Any
    default: Any
    help: Help

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return f"--{self.name.rstrip('_').replace('_', '-')}"  # from_ is --from

    @property
    def hint(self) -> Any:
        """The type, with None if that is the default."""
        return self.kind | None if self.default is None else self.kind

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a ``Literal``; empty for other types."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


@cache
def declared(cls: type) -> tuple[Option, ...]:
    """Return the options that the fields of a dataclass declare, in order; fields without help are none."""
    hints = get_type_hints(cls, include_extras=True)
    options: list[Option] = []
    for field in fields(cls):
        if get_origin(hints[field.name]) is not Annotated:
            continue
        kind, *metadata = get_args(hints[field.name])
        if isinstance(metadata[0], str):
            metadata = [Help("".join(metadata[1:2]), metadata[0], solvers=tuple(metadata[1:]))]
        options.append(Option(field.name, _without_none(kind), field.default, metadata[0]))
    return tuple(options)


def _without_none(kind: Any) -> Any:
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return Union[tuple(part for part in get_args(kind) if part is not NoneType)]  # noqa: UP007  # known only here


def check(values: Any) -> None:
    """Check every declared field of a dataclass instance.

    Raises:
        UsageError: naming the first option with a value that it may not have.
    """
    for option in declared(type(values)):
        check_value(option, getattr(values, option.name))


def check_value(option: Option, value: Any) -> None:
    """Raise UsageError if ``option`` may not have this value."""
    limit = option.help.limit
    if value is None and option.default is None:
        return
    if isinstance(value, str | Path) and "\0" in str(value):
        raise UsageError(f"{option.flag} has a NUL character in it")
    if option.choices and value not in option.choices:
        raise UsageError(f"{option.flag} must be one of {', '.join(map(str, option.choices))}, not {value}")
    if words := _mismatch(value, option.kind):
        raise UsageError(f"{option.flag} must be {words}, not {value!r}")
    if limit and not limit.holds(value):
        raise UsageError(f"{option.flag} must be {limit.text}, not {value}")


_KINDS: Final[dict[Any, tuple[str, Any]]] = {
    bool: ("True or False", bool),
    int: ("a whole number", Integral),
    float: ("a number", Real),
    str: ("a text", str),
    Path: ("a path", (str, PathLike)),
}


def _mismatch(value: Any, kind: Any) -> str:
    """Return the kind of value that is expected, in words; empty if ``value`` is one."""
    if get_origin(kind) in (Union, UnionType):
        words = [_mismatch(value, part) for part in get_args(kind)]
        return " or ".join(words) if all(words) else ""
    if get_origin(kind) is Literal:
        return "" if value in get_args(kind) else " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is Sequence:
        fits = not isinstance(value, str) and isinstance(value, Sequence) and all(isinstance(one, str) for one in value)
        return "" if fits else "a list of texts"
    words, expected = _KINDS.get(kind, ("", object))
    return "" if isinstance(value, expected) and (kind is bool or not isinstance(value, bool)) else words


def docstring(options: Iterable[Option]) -> str:
    """Return the ``Args:`` section of a function that takes ``options``."""
    lines = ["Args:"]
    for option in options:
        text = f"{option.name}: {option.help.text} {option.help.more}".strip()
        lines += textwrap.wrap(text, 112, initial_indent=" " * 4, subsequent_indent=" " * 8)
    return "\n".join(lines)
