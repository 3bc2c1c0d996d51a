"""Score checkpoints and averages as they lie on disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.dtypes import FLOATING
from ckptavg.checkpoints.integrity import not_finite
from ckptavg.checkpoints.state_dict import check_agreement
from ckptavg.errors import TaskError, UsageError
from ckptavg.objective.mixture import Mixture
from ckptavg.options import Options
from ckptavg.pipeline.objective_choice import pick_device
from ckptavg.pipeline.session import translate_errors
from ckptavg.pipeline.task_choice import build_task
from ckptavg.runtime.progress import Watch
from ckptavg.runtime.seeds import reproducible
from ckptavg.score import Score, Split


def evaluate(
    files: Sequence[Path], task: str | None = None, *, watch: Watch | None = None, **options: Any
) -> list[tuple[Path, dict[Split, Score]]]:
    """The scores of each file on validation and test data, with the BatchNorm statistics that it holds.

    Args:
        files: checkpoints or earlier outputs; a directory stands for the checkpoints in it.
        task: a Python file or dotted module.
        watch: is told the progress.
        **options: of `ckptavg.options.Options`: key, device, seed, task_timeout; instead of ``task`` val and test, or
            lm_eval.
    """
    asked = Options(task=task, **options)
    if not asked.ways:
        raise UsageError("scoring needs a task file, --val or --lm-eval", hint="`ckptavg init` writes ./task.py")
    if asked.score_cmd is not None:
        raise UsageError("a file as it is needs no ckptavg to be scored by --score-cmd: run the command itself")
    with translate_errors(), reproducible(asked.seed), ExitStack() as stack:
        # one after the other, because files that are only scored need no step to be put in order by
        found = [one for file in files for one in stack.enter_context(discover([file], key=asked.key)).checkpoints]
        check_agreement(found)
        # one row is enough of a matrix: every file is loaded into the model as it is
        made = build_task(asked, found[0].folder)
        mixture = Mixture(
            made, found[:1], device=pick_device(asked.device), seed=asked.seed, watch=watch, workers=asked.workers
        )
        scored: list[tuple[Path, dict[Split, Score]]] = []
        for i, checkpoint in enumerate(found):
            mixture.load(checkpoint.tensors, checkpoint.read_into)
            try:
                scores: dict[Split, Score] = {
                    split: mixture.evaluate(split, str(checkpoint.path)) for split in mixture.splits
                }
            except TaskError as error:
                floating = [name for name in checkpoint.names if checkpoint.spec(name).dtype in FLOATING]
                if bad := next(filter(None, map(partial(not_finite, checkpoint), floating)), None):
                    bad.hint = None  # there is nothing to leave out
                    raise bad from error
                raise
            scored.append((checkpoint.path, scores))
            mixture.progress("scoring", i + 1, len(found))
        return scored
