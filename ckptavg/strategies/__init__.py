"""The algorithms. One file a strategy, its name the command's; a module that ends in ``STRATEGY = ...`` is one.

Only `ckptavg.objective`, `ckptavg.coefficients`, `ckptavg.errors` and torch are visible here (and torch inside the
functions, so that a command's help can be shown without importing it).
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ckptavg.objective import Strategy


@cache
def strategies() -> dict[str, type[Strategy]]:
    """Command name → strategy, for every strategy file."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").STRATEGY for name in names}
