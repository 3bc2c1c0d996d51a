"""The options that commands share, each declared once: see `ckptavg.declaration`."""

from dataclasses import dataclass, fields
from typing import Any, Final, Self

from ckptavg.checkpoints.window import Window
from ckptavg.declaration import Option, declared
from ckptavg.errors import UsageError
from ckptavg.options.output import OutputOptions
from ckptavg.options.run import RunOptions
from ckptavg.options.search import SearchOptions
from ckptavg.options.task import TaskOptions

_PARTS: Final = (TaskOptions, OutputOptions, SearchOptions, RunOptions)


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, SearchOptions, OutputOptions, TaskOptions):
    """All options that commands share."""

    def __post_init__(self) -> None:
        for part in _PARTS:
            part.__post_init__(self)
        if self.shard and self.workers.world_size == 1:
            raise UsageError("--shard needs several workers", hint="torchrun --nproc-per-node 8 -m ckptavg ...")
        if self.shard and (self.score_cmd is not None or self.lm_eval is not None):
            raise UsageError("--shard needs a loss: a task file or --val")
        given = {
            "--offload": self.offload != "none",
            "--precision": self.precision != "float32",
            "--compile": self.compile,
        }
        if self.score_cmd is not None and any(given.values()):
            unused = ", ".join(name for name, asked in given.items() if asked)
            raise UsageError(f"{unused} applies to a model that ckptavg runs, but --score-cmd runs its own")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Return the options from their names on the command line, where those of `Window` are options like others."""
        window = {field.name: values.pop(field.name) for field in fields(Window) if field.name in values}
        return cls(**values, window=Window(**window))

    def measured(self) -> dict[str, Any]:
        """Return the options that a measurement depends on, by name."""
        return {o.name: getattr(self, o.name) for o in shared() if o.help.changes_measurements}


def shared() -> tuple[Option, ...]:
    """Return the options of `Options` and `Window`, in the order of a help page."""
    parts = (TaskOptions, Window, OutputOptions, SearchOptions, RunOptions)
    return tuple(option for part in parts for option in declared(part))
