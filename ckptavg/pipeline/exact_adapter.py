"""Recommendation of ``--adapter exact`` where an average of factors was written."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ckptavg.average import PlannedOutput
from ckptavg.checkpoints.window import Window
from ckptavg.coefficients import Coefficients
from ckptavg.declaration import declared
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.pipeline.session import Session
from ckptavg.strategies import name_of
from ckptavg.strategies.swa import SWA

_REPLACED = ("output", "force", "keep", "average", "adapter")


def factor_note(this: Session, plan: PlannedOutput, coefficients: Coefficients, strategy: Strategy) -> list[str]:
    """Return how far the average of factors is off, with the command that writes the exact one.

    A learned subset is written as the plain average that it is, without another search.
    """
    if plan.factor_error is None:
        return []
    paths, replaced = list(this.paths), _REPLACED
    if coefficients.uniform_subset and not isinstance(strategy, PlainAverage):
        strategy, paths = SWA(), [this.checkpoints[i].path for i in coefficients.selected]
        replaced = (*_REPLACED, *(option.name for option in declared(Window)))
    words = ["ckptavg", name_of(strategy), *map(str, paths), *given(strategy), *given(this.options, replaced)]
    output = Path(this.options.output)
    place = f"{output}-exact/" if this.options.destination[1] else str(output.with_stem(f"{output.stem}-exact"))
    command = shlex.join([*words, "--adapter", "exact", "-o", place])
    return [f"averaging the adapter's factors is {plan.factor_error:.1%} off the exact average; for that: {command}"]


def given(settings: Any, without: Collection[str] = ()) -> list[str]:
    """Return the declared fields that do not have their default, as words of a command."""
    words: list[str] = []
    for option in declared(type(settings)):
        value = getattr(settings, option.name)
        if value == option.default or option.name in without:
            continue
        if isinstance(value, bool):
            words.append(option.flag if value else f"--no-{option.flag[2:]}")
        else:
            several = value if isinstance(value, list | tuple) else [value]
            words += [word for each in several for word in (option.flag, str(each))]
    return words
