"""Turn the checkpoints of a training job into one better model.

Every strategy is a function: ``ckptavg.sewa("ckpts", k=5, task="task.py")`` writes the file and returns the report,
with the names and defaults of the command line. Submodules are imported lazily, on first use.

The first use of a name also sets environment variables for the wait policy and number of OpenMP threads of this process
and its children, unless they are set already; see `ckptavg.runtime.threads`. If torch is imported already, torch, its
threads and the environment stay unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptavg.api import check as check
    from ckptavg.api import compare as compare
    from ckptavg.api import evaluate as evaluate
    from ckptavg.api import inspect as inspect
    from ckptavg.api import landscape as landscape
    from ckptavg.api import run as run
    from ckptavg.api import swag as swag
    from ckptavg.api import verify as verify
    from ckptavg.errors import CkptavgError as CkptavgError
    from ckptavg.report.posterior import PosteriorResult as PosteriorResult
    from ckptavg.report.result import Comparison as Comparison
    from ckptavg.report.result import Landscape as Landscape
    from ckptavg.report.result import Result as Result

    __version__: str

_MODULES = {
    "run": "api", "compare": "api", "landscape": "api", "evaluate": "api", "check": "api", "inspect": "api",
    "verify": "api", "swag": "api", "PosteriorResult": "report.posterior", "CkptavgError": "errors",
    "Result": "report.result", "Comparison": "report.result", "Landscape": "report.result",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    from importlib import import_module

    if name == "__version__":
        from ckptavg.runtime.version import own

        return own()
    module = _MODULES.get(name)
    if module is None:
        from ckptavg.strategies import strategies

        if name not in strategies():
            raise AttributeError(f"module 'ckptavg' has no attribute {name!r}")
        module = "api"
    from ckptavg.runtime.threads import configure

    configure()
    return getattr(import_module(f"ckptavg.{module}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    from ckptavg.strategies import strategies

    return sorted([*_MODULES, *strategies(), "__version__"])
