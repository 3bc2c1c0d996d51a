"""``ckptavg eval``: score checkpoint files as they are."""

import json as json_module
from pathlib import Path
from typing import Any, Final

from ckptavg.cli.command import takes
from ckptavg.cli.options import NO_REPORT, SHARED
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.runtime.workers import joined

_OPTIONS: Final = (
    "key", "task", "task_timeout", "val", "test", "batch_size", "trust_remote_code", "lm_eval", "device", "seed",
    "worker_timeout",
)  # fmt: skip


@takes(*(SHARED[name] for name in _OPTIONS), *NO_REPORT)
def command(ckpts: list[Path], json: bool, quiet: bool, verbose: bool, task: str | None, **options: Any) -> None:
    """Score files on the task's validation and test data, with their BatchNorm statistics."""
    from ckptavg.cli.terminal import Screen, console, stdout_for_data

    meeting = joined(options["device"], options["worker_timeout"])
    with meeting as workers, stdout_for_data(), Screen(quiet=quiet).watching() as watch:
        from ckptavg.pipeline.evaluation import evaluate
        from ckptavg.pipeline.task_choice import find_task

        if options["val"] is None and options["lm_eval"] is None:  # the output often lies beside ./task.py
            task = find_task(task, [path for path in ckpts if is_folder(path)])
        scored = evaluate(ckpts, task, watch=watch, workers=workers, **options)
    if not workers.is_rank_zero:
        return
    if json:
        print(json_module.dumps(scored.to_dict()["files"], indent=2))
    else:
        console().print(scored)
