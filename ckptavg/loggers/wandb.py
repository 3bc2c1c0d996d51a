"""Weights & Biases: a run of its own, beside one that the process may have open already."""

from typing import Any

from ckptavg.loggers import Record


def start(target: str, name: str) -> "WandB":
    """Start a run in the project ``target``, by default W&B's own choice; settings are those of its environment."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", reinit="create_new")
    return WandB(wandb.init(project=target or None, name=name, job_type="ckptavg", settings=settings))


class WandB:
    """A run; the axis of a stage's figures is the stage's step, that of the candidates' the training step."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._axes: set[str] = set()

    def scalar(self, name: str, value: float, step: int) -> None:
        """See `ckptavg.loggers.Logger.scalar`; a thread of W&B sends it."""
        axis = f"{name.rpartition('/')[0]}/step"
        if axis not in self._axes:
            self._axes.add(axis)
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(f"{name.rpartition('/')[0]}/*", step_metric=axis)
        self._run.log({name: value, axis: step})

    def finish(self, record: Record) -> None:
        """Log settings as configuration, figures as summary, and curves over training steps."""
        self._run.config.update(dict(record.settings), allow_val_change=True)
        for name, points in record.series.items():
            for step, value in points:
                self.scalar(name, value, step)
        self._run.summary.update({**record.scalars, "verdict": record.verdict})

    def close(self, *, failed: bool) -> None:
        """End the run, once all is sent."""
        self._run.finish(exit_code=int(failed))
