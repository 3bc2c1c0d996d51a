"""The options that commands share, each declared once: see `ckptavg.declaration`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from ckptavg import loggers
from ckptavg.checkpoints.window import Window
from ckptavg.declaration import CANDIDATES, MAIN, RUN, WORKERS, Help, Limit, declared
from ckptavg.errors import UsageError
from ckptavg.options.follow import DURATION, FOLLOW, FollowOptions
from ckptavg.options.output import OutputOptions
from ckptavg.options.search import SearchOptions
from ckptavg.options.task import TaskOptions
from ckptavg.runtime.workers import ALONE, TIMEOUT, Workers

CHECK: Final = (
    "task", "val", "device", "last", "task_timeout", "train", "test", "holdout", "batch_size", "labels",
    "max_length", "base", "trust_remote_code",
    "component", "step_from", "include", "exclude", "start", "stop", "every", "key", "seed", "bits", "group_size",
    "offload",
)  # fmt: skip
"""The options of ``check``."""
EVAL: Final = (
    "key", "task", "task_timeout", "val", "test", "batch_size", "labels", "max_length", "base", "trust_remote_code",
    "lm_eval", "device", "seed", "worker_timeout",
)  # fmt: skip
"""The options of ``eval``."""
NOT_INSPECT: Final = (
    "output", "force", "never_worse", "dtype", "max_shard_size", "format", "adapter", "rank", "digests", "test",
    "precision", "compile", "shard", "wait_stable", "dry_run", "keep_journal", "baselines",
    "log_to", *FOLLOW,
)  # fmt: skip
"""The options that ``inspect`` does not take."""
NOT_COMPARE: Final = ("never_worse", "baselines", *FOLLOW)
"""The options that ``compare`` does not take."""
NOT_SWAG: Final = ("adapter", "rank", "format", *FOLLOW)
"""The options that ``swag`` does not take."""
_ABOVE_0: Final = Limit(lambda value: value > 0, "greater than 0")


@dataclass(frozen=True, kw_only=True)
class Options(SearchOptions, FollowOptions, OutputOptions, Window, TaskOptions):
    """All options that commands share. The candidates themselves are part of a journal's fingerprint."""

    key: Annotated[str | None, Help(
        CANDIDATES, "Entry of each file that is the model, such as state_dict_ema.", metavar="KEY")] = None  # fmt: skip
    skip_bad: Annotated[bool, Help(
        CANDIDATES, "Leave out damaged or NaN checkpoints, with a warning each.",
        "Else they are refused. Where --score-cmd fails, or prints NaN, the score is the worst.",
        changes_measurements=False)] = False  # fmt: skip
    allow_nonfinite: Annotated[bool, Help(
        CANDIDATES, "Average NaN and infinite weights instead of refusing them.")] = False  # fmt: skip
    wait_stable: Annotated[float | None, Help(
        CANDIDATES, "First wait until no checkpoint has changed for SECONDS.",
        "With --follow, take each once it has not; by default 5.", "SECONDS", limit=DURATION,
        changes_measurements=False)] = None  # fmt: skip
    dry_run: Annotated[
        bool, Help(MAIN, "Show what would be done, and stop.", "Memory included.", changes_measurements=False)
    ] = False
    resume: Annotated[bool, Help(
        RUN, "Continue an interrupted run.", "Its measurements are in the journal OUTPUT.ckptavg/.",
        changes_measurements=False)] = True  # fmt: skip
    keep_journal: Annotated[bool, Help(RUN, "Keep OUTPUT.ckptavg/ after the run.", changes_measurements=False)] = False
    baselines: Annotated[bool, Help(
        RUN, "Score last, SWA and LAWA.", "Also every candidate alone. Not in compare.", changes_measurements=False
    )] = True  # fmt: skip
    log_to: Annotated[Sequence[str], Help(
        RUN, "Also log to tensorboard:DIR, wandb or mlflow.",
        "wandb:PROJECT and mlflow:EXPERIMENT name one; may be repeated.", "LOGGER", changes_measurements=False
    )] = ()  # fmt: skip
    worker_timeout: Annotated[
        float, Help(WORKERS, "Timeout between ranks.", metavar="SECONDS", limit=_ABOVE_0, changes_measurements=False)
    ] = TIMEOUT
    workers: Workers = field(default=ALONE, repr=False)

    def __post_init__(self) -> None:
        for part in (TaskOptions, OutputOptions, FollowOptions, SearchOptions):
            part.__post_init__(self)
        loggers.check(self.log_to)
        if self.shard and self.workers.world_size == 1:
            raise UsageError("--shard needs several workers", hint="torchrun --nproc-per-node 8 -m ckptavg ...")
        if self.shard and (self.score_cmd is not None or self.lm_eval is not None):
            raise UsageError("--shard needs a loss: a task file or --val")
        if self.score_jobs > 1 and self.workers.world_size > 1:
            raise UsageError("--score-jobs is for a single process: under torchrun each worker runs a command")
        if self.follow and self.workers.world_size > 1:
            raise UsageError("--follow runs in a single process", hint="leave out torchrun")
        if self.follow and self.max_shard_size is not None:
            raise UsageError("--follow replaces one file at once, not those of --max-shard-size")
        if self.follow and self.dry_run:
            raise UsageError("--dry-run shows one run", hint="leave out --follow")
        if self.shard and self.adapter == "exact":
            raise UsageError("--adapter exact is scored in a model of its own rank, which --shard does not divide")
        defaults = {"offload": "none", "precision": "float32", "compile": False}
        unused = [f"--{name}" for name, default in defaults.items() if getattr(self, name) != default]
        if self.score_cmd is not None and unused:
            message = f"{', '.join(unused)} applies to a model that ckptavg runs, but --score-cmd runs its own"
            raise UsageError(message)

    def measured(self) -> dict[str, Any]:
        """Return the options that a measurement depends on, by name."""
        return {o.name: getattr(self, o.name) for o in declared(Options) if o.help.changes_measurements}
