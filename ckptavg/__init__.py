"""Turn the checkpoints of a training job into one better model.

Every strategy is a function: ``ckptavg.sewa("ckpts", k=5, task="task.py")`` writes the file and returns the report,
with the names and defaults of the command line. Nothing is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptavg.api import compare as compare
    from ckptavg.api import landscape as landscape
    from ckptavg.api import run as run
    from ckptavg.errors import CkptavgError as CkptavgError
    from ckptavg.result import Comparison as Comparison
    from ckptavg.result import Landscape as Landscape
    from ckptavg.result import Result as Result

    __version__: str

_HOME = {
    "run": "api", "compare": "api", "landscape": "api", "evaluate": "evaluation", "verify": "verification",
    "CkptavgError": "errors", "Result": "result", "Comparison": "result", "Landscape": "result",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    from importlib import import_module

    if name == "__version__":
        return _version()
    if name in _HOME:
        return getattr(import_module(f"ckptavg.{_HOME[name]}"), name)
    from ckptavg.strategies import strategies

    if name in strategies():
        return getattr(import_module("ckptavg.api"), name)
    raise AttributeError(f"module 'ckptavg' has no attribute {name!r}")


def _version() -> str:
    """The installed version; "0+unknown" where the source tree is imported without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ckptavg")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    """The public names."""
    from ckptavg.strategies import strategies

    return sorted([*_HOME, *strategies(), "__version__"])
