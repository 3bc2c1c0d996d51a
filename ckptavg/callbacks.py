"""Callbacks that average the checkpoints when a training ends: `TransformersCallback` and `LightningCallback`.

Both take a strategy and the options of `ckptavg.run` as keywords, and keep its report in ``result``. Rank 0 averages,
after the last checkpoint is saved. The framework is imported when its class is first used.
"""

import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from ckptavg.errors import CkptavgError
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.report.result import Result
from ckptavg.strategies import from_spec

_SCORING: Final = {"task", "val", "score_cmd", "lm_eval", "model", "loss"}


class Averaging:
    """The strategy and options of a callback, and its run.

    An error of the run is a warning, because the training is done; options and output are checked when it starts.

    Args:
        strategy: such as ``"sewa:k=5"``, or a strategy object.
        **options: those of `ckptavg.run`.
    Raises:
        CkptavgError: for an unknown strategy or option.
    """

    result: Result | None = None

    def __init__(self, strategy: str | Strategy = "swa", **options: Any) -> None:
        from ckptavg.api import keywords

        self.strategy = from_spec(strategy) if isinstance(strategy, str) else strategy
        self.options = keywords("run", options)

    @property
    def needs_task(self) -> bool:
        """Whether the strategy scores and no option says how."""
        return not isinstance(self.strategy, PlainAverage) and not _SCORING & self.options.keys()

    def check(self, output: str) -> None:
        """Raise OutputError if the output could not be written at the end."""
        from ckptavg.options import Options
        from ckptavg.pipeline.preflight import check_output

        given = {name: self.options[name] for name in ("output", "force", "format") if name in self.options}
        folder = Path(given.setdefault("output", output)).parent
        if folder.exists():  # else the training makes it
            check_output(Options(**given))

    def average(self, ckpts: Any, output: str, say: Callable[[str], object], **more: Any) -> None:
        """Run the strategy on ``ckpts``, and say its verdict."""
        from ckptavg.api import run

        options: dict[str, Any] = {"output": output, **more, **self.options}
        try:
            self.result = run(ckpts, self.strategy, **options)
        except CkptavgError as error:
            hint = f" ({error.hint})" if error.hint else ""
            warnings.warn(f"ckptavg: the checkpoints were not averaged: {error}{hint}", stacklevel=2)
            return
        written = f"wrote {self.result.output.path}" if self.result.output else "nothing was written"
        say(f"ckptavg: {self.result.verdict} {written}".replace("  ", " "))


def _transformers() -> type:
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback
    from transformers.utils.logging import get_logger

    class TransformersCallback(Averaging, TrainerCallback):
        """Average the checkpoints of a `transformers.Trainer` into ``OUTPUT_DIR/averaged/``.

        A strategy that scores uses the Trainer's evaluation data and the model's own loss, unless options name a task.
        """

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                self.check(f"{args.output_dir}/averaged/")

        def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
            if not state.is_world_process_zero:
                return
            more: dict[str, Any] = {}
            if self.needs_task and (loader := trainer.get("eval_dataloader")) is not None:
                # the Trainer's own loader is divided among ranks
                val = DataLoader(loader.dataset, args.eval_batch_size, collate_fn=loader.collate_fn)
                more = {"model": trainer["model"], "loss": lambda model, batch: model(**batch).loss, "val": val}
            say = get_logger("transformers.trainer").warning
            self.average(args.output_dir, f"{args.output_dir}/averaged/", say, **more)

    return TransformersCallback


def _lightning() -> type:
    old = "pytorch_lightning" in sys.modules and "lightning" not in sys.modules
    lightning: Any = import_module("pytorch_lightning" if old else "lightning.pytorch")

    class LightningCallback(Averaging, lightning.Callback):
        """Average the checkpoints that Lightning's `ModelCheckpoint` saved into ``averaged.safetensors`` beside them.

        A task of objects needs ``loss`` only: the model is a copy of the module, and ``val`` the validation data.
        """

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero and (folders := _folders(trainer)):
                self.check(f"{folders[0]}/averaged.safetensors")

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.is_global_zero:
                return
            folders, loaders = _folders(trainer), trainer.val_dataloaders
            if not folders:
                warnings.warn("ckptavg: nothing was averaged, because no ModelCheckpoint saved a file", stacklevel=2)
                return
            objects = {"model": pl_module, "val": loaders[0] if isinstance(loaders, list) else loaders}
            more = objects if "loss" in self.options else {}
            pl_module.trainer = None  # a copy of the module would copy it, with its loaders
            try:
                say = lightning.utilities.rank_zero_info
                self.average(folders, f"{folders[0]}/averaged.safetensors", say, **more)
            finally:
                pl_module.trainer = trainer

    return LightningCallback


def _folders(trainer: Any) -> list[str]:
    return list(dict.fromkeys(saver.dirpath for saver in trainer.checkpoint_callbacks if saver.dirpath))


_CLASSES: Final = {"TransformersCallback": _transformers, "LightningCallback": _lightning}


@cache
def __getattr__(name: str) -> Any:
    """Make a class on first use."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    cls = _CLASSES[name]()
    cls.__qualname__ = name  # so that it can be pickled
    return cls


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(_CLASSES)
