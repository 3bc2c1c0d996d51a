"""``ckptavg eval``: score checkpoint files as they are."""

import json as json_module
from pathlib import Path
from typing import Any, Final

from ckptavg.cli.command import takes
from ckptavg.cli.options import NO_REPORT, SHARED
from ckptavg.errors import printable
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.runtime.workers import joined

_OPTIONS: Final = (
    "key", "task", "task_timeout", "val", "test", "batch_size", "trust_remote_code", "lm_eval", "device", "seed",
    "worker_timeout",
)  # fmt: skip


@takes(*(SHARED[name] for name in _OPTIONS), *NO_REPORT)
def command(ckpts: list[Path], json: bool, quiet: bool, verbose: bool, task: str | None, **options: Any) -> None:
    """Score files on the task's validation and test data, with their BatchNorm statistics."""
    from rich.table import Table
    from rich.text import Text

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
        fields = ("loss", "metric", "examples")
        rows: list[dict[str, Any]] = []
        for path, scores in scored:
            by_split = {split: {name: getattr(score, name) for name in fields} for split, score in scores.items()}
            rows.append({"path": str(path), **by_split})
        print(json_module.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    for split in scored[0][1]:
        table.add_column(f"{split} metric", justify="right")
        table.add_column(f"{split} loss", justify="right")
    for path, scores in scored:
        figures = [figure for score in scores.values() for figure in (score.metric, score.loss)]
        table.add_row(Text(printable(str(path))), *("" if x is None else f"{x:.4f}" for x in figures))
    console().print(table)
