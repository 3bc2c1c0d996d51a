"""``ckptavg eval``: score checkpoint files as they are."""

import json as json_module
from pathlib import Path
from typing import Any, Final

from ckptavg.cli.command import takes
from ckptavg.cli.options import NO_REPORT, SHARED
from ckptavg.errors import printable
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.runtime.workers import joined

_MOST: Final = 5  # columns of figures; more are divided into a row for each split
_OPTIONS: Final = (
    "key", "task", "task_timeout", "val", "test", "batch_size", "labels", "max_length", "base", "trust_remote_code",
    "lm_eval", "device", "seed", "worker_timeout",
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
        from ckptavg.report.as_json import plain

        print(json_module.dumps([{"path": str(path)} | plain(scores) for path, scores in scored], indent=2))
        return
    columns = [(split, name) for split, score in scored[0][1].items() for name in score.figures]
    split_rows = len(columns) > _MOST
    headings = list(dict.fromkeys(name for _, name in columns)) if split_rows else [" ".join(pair) for pair in columns]
    table = Table(box=None, pad_edge=False)
    for heading in ("file", *(["data"] if split_rows else [])):
        table.add_column(heading)
    for heading in headings:
        table.add_column(Text(heading), justify="right", overflow="fold")
    for path, scores in scored:
        cells = {split: [f"{value:.4f}" for value in score.figures.values()] for split, score in scores.items()}
        whole = [figure for figures in cells.values() for figure in figures]
        for row in [[split, *figures] for split, figures in cells.items()] if split_rows else [whole]:
            table.add_row(Text(printable(str(path))), *row)
    console().print(table)
