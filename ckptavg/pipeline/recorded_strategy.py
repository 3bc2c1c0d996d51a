"""The strategy in an output's metadata, as untrusted input: its settings, and what follows for the coefficients."""

import json
import math
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from ckptavg import declaration
from ckptavg.coefficients import EVERYTHING, Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.strategies import strategies
from ckptavg.strategies.twa import TWA

_UNIFORM: Final = ("aswa", "best", "sewa", "soup")  # strategies that choose a subset and average it with equal weights
_SAME: Final = 1e-12  # relative difference of equal coefficients; powers may differ by an ulp between machines


def constructed(name: str, settings: Mapping[str, Any]) -> Strategy | None:
    """Return the strategy with its recorded settings; raise ValueError if they are not its own.

    A strategy of one's own (`ckptavg.run`) is recorded by the name of its class, whose settings have no meaning here:
    the result is None.
    """
    if name not in strategies():
        return None
    cls = strategies()[name]
    options = {option.name: option for option in declaration.declared(cls)}
    if wrong := sorted(options.keys() ^ settings.keys()):
        raise ValueError(
            f"settings.{wrong[0][:100]} is {'missing' if wrong[0] in options else f'no setting of {name}'}"
        )
    for key, value in settings.items():
        if not _has_type(value, options[key].hint):
            raise ValueError(f"settings.{key} cannot be {shown(value)}")
    try:
        strategy = cls(**settings)
        declaration.check(strategy)
    except UsageError as error:
        raise ValueError(f"settings of {name}: {error}") from error
    return strategy


def check_coefficients(name: str, strategy: Strategy, coefficients: Coefficients, runs: Sequence[int] | None) -> None:
    """Raise ValueError if the strategy cannot have led to the coefficients of sources of these ``runs``."""
    n = coefficients.n
    by_run = isinstance(strategy, PlainAverage) and strategy.by_run
    if (runs is not None) != by_run or len(runs or [0] * n) != n:
        raise ValueError(f"runs must be one for each of {n} sources, and only where {name} averages by run")
    by_block = isinstance(strategy, TWA) and (strategy.layerwise or strategy.block_size is not None)
    if coefficients.groups != EVERYTHING and not by_block:
        raise ValueError(f"groups must be one for all tensors, as {name} with its settings has")
    if isinstance(strategy, PlainAverage):
        # powers of a small decay may be zero: the other coefficients are those of one candidate more
        rows = _by_run(coefficients.values[0], runs or [0] * n)
        if not all(any(_equal(row, strategy, m) for m in (len(row), len(row) + 1)) for row in rows):
            raise ValueError(f"the coefficients of {n} sources are not those of {name} with its settings")
    elif name in _UNIFORM:
        if coefficients != Coefficients.uniform(range(n), n):
            raise ValueError(f"the coefficients are not equal, as those of {name} are")
        k = 1 if name == "best" else getattr(strategy, "k", "auto")
        # SeWA may take a single candidate, or the mean of all, if it is better than every average of k
        if isinstance(k, int) and k != n and not (name == "sewa" and (n == 1 or n > k)):
            raise ValueError(f"{n} sources, but {name} with its settings has {k}")
    elif isinstance(strategy, TWA) and strategy.constraint == "simplex" and min(map(min, coefficients.values)) < 0:
        raise ValueError("a coefficient is negative, but the constraint is simplex")


def _by_run(row: Sequence[float], runs: Sequence[int]) -> list[list[float]]:
    """Return the coefficients within each run, times the number of runs."""
    members = dict.fromkeys(runs)
    return [[len(members) * c for c, its in zip(row, runs, strict=True) if its == run] for run in members]


def _equal(row: Sequence[float], strategy: PlainAverage, n: int) -> bool:
    """Return whether ``row`` has the coefficients of ``strategy`` for ``n`` candidates, less the zero ones."""
    try:
        expected = [c for c in strategy.coefficients(n).values[0] if c != 0]
    except ValueError:  # fewer candidates than its settings require
        return False
    return len(row) == len(expected) and all(
        math.isclose(a, b, rel_tol=_SAME) for a, b in zip(row, expected, strict=True)
    )


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a setting's JSON value has the type of its option."""
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (NoneType if hint is None else hint)


def shown(value: Any) -> str:
    """Return a JSON value as a short text."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
