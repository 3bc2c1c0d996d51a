"""The algorithms: one module per strategy, named like its command, that ends in ``STRATEGY = ...``.

Strategies import only `ckptavg.objective`, `ckptavg.coefficients`, `ckptavg.errors` and, inside functions, torch and
`ckptavg.strategies.solvers`, so that the help pages load without torch.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any, Literal, get_args, get_origin

from ckptavg.declaration import declared
from ckptavg.errors import UsageError, nearest
from ckptavg.objective import Strategy


@cache
def strategies() -> dict[str, type[Strategy]]:
    """Return command name → strategy class, for every module of the package that defines ``STRATEGY``."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module.STRATEGY for name, module in modules.items() if hasattr(module, "STRATEGY")}


def name_of(strategy: Strategy) -> str:
    """Return the name of the strategy's command, or of its class if it has none."""
    names = (name for name, cls in strategies().items() if isinstance(strategy, cls))
    return next(names, type(strategy).__name__)


def specs(listed: str | Iterable[str]) -> list[str]:
    """Return the specs of a comma-separated text, or of several such texts."""
    texts = [listed] if isinstance(listed, str) or not isinstance(listed, Iterable) else [*listed]
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"strategies must be texts such as 'sewa:k=8', not {listed!r}")
    return [spec.strip() for text in texts for spec in text.split(",") if spec.strip()]


def from_spec(spec: str) -> Strategy:
    """Return the strategy of ``NAME`` or ``NAME:setting=value:setting=value``, such as ``twa:on=train:lr=0.01``.

    A strategy or setting that is unknown, or a value of the wrong type, is a UsageError.
    """
    name, *given = spec.split(":")
    if name not in strategies():
        raise UsageError(f"{spec}: there is no strategy {name!r}", hint=nearest(name, strategies()))
    strategy = strategies()[name]
    kinds = {option.name: option.kind for option in declared(strategy)}
    settings: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        key = key.replace("-", "_")
        if key not in kinds:
            raise UsageError(f"{spec}: {name} has no setting {key!r}", hint=nearest(key, kinds))
        try:
            settings[key] = _parsed(value if equals else "true", kinds[key])
        except ValueError as error:
            raise UsageError(f"{spec}: {key} cannot be {value!r}") from error
    try:
        return strategy(**settings)
    except UsageError as error:
        raise UsageError(f"{spec}: {error}", hint=error.hint) from error


def _parsed(text: str, kind: Any) -> Any:
    """Return a setting's value from its text; raise ValueError if the text is not of type `kind`."""
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if kind in (int, float, str):
        return kind(text)
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(text)
        return text
    for option in get_args(kind):  # int | Literal["auto"]
        with suppress(ValueError):
            return _parsed(text, option)
    raise ValueError(text)
