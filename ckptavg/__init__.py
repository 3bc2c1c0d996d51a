"""Turn the checkpoints of a training job into one better model.

Every strategy is a function: ``ckptavg.sewa("ckpts", k=5, task="task.py")`` writes the file and returns the report,
with the names and defaults of the command line. Nothing is imported before it is used.

The first use of a name also sets how OpenMP's threads wait and how many there are, for this process and those it
starts, by variables of the environment that are not set yet; see `ckptavg.runtime.threads`. A program that has
imported torch before keeps torch, its threads and the environment as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptavg.api import compare as compare
    from ckptavg.api import landscape as landscape
    from ckptavg.api import run as run
    from ckptavg.errors import CkptavgError as CkptavgError
    from ckptavg.report.result import Comparison as Comparison
    from ckptavg.report.result import Landscape as Landscape
    from ckptavg.report.result import Result as Result

    __version__: str

_HOME = {
    "run": "api", "compare": "api", "landscape": "api", "evaluate": "pipeline.evaluation",
    "verify": "pipeline.verification", "CkptavgError": "errors", "Result": "report.result",
    "Comparison": "report.result", "Landscape": "report.result",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    from importlib import import_module

    if name == "__version__":
        return _version()
    home = _HOME.get(name)
    if home is None:
        from ckptavg.strategies import strategies

        if name not in strategies():
            raise AttributeError(f"module 'ckptavg' has no attribute {name!r}")
        home = "api"
    from ckptavg.runtime.threads import settle

    settle()
    return getattr(import_module(f"ckptavg.{home}"), name)


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
