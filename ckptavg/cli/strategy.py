"""Generate a strategy's command from the fields of its dataclass and the options that all strategies share."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ckptavg.cli.command import reporting, run_command
from ckptavg.declaration import declared
from ckptavg.objective import PlainAverage, Strategy


def command(name: str, strategy: type[Strategy]) -> Callable[..., None]:
    """Return the function behind ``ckptavg NAME``: main settings come first, and each solver's settings together."""
    settings = sorted(declared(strategy), key=lambda setting: setting.help.panel)

    def run(**arguments: Any) -> None:
        chosen = strategy(**{setting.name: arguments.pop(setting.name) for setting in settings})
        from ckptavg.pipeline import run as run_pipeline

        run_command(arguments, partial(run_pipeline, chosen), needs_task=not issubclass(strategy, PlainAverage))

    return reporting(run, name, (strategy.__doc__ or "").strip().splitlines()[0], settings)
