"""``ckptavg eval``: score checkpoint files as they are."""

from __future__ import annotations

import json as json_module
from typing import Any

from ckptavg.cli.options import (  # fmt: skip
    BatchSize,
    Device,
    Json,
    Key,
    LmEval,
    Paths,
    Quiet,
    Seed,
    TaskFile,
    TaskTimeout,
    Test,
    TrustRemoteCode,
    Val,
    Verbose,
    WorkerTimeout,
)
from ckptavg.errors import printable
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.runtime.workers import TIMEOUT, joined


def command(
    files: Paths,
    key: Key = None,
    task: TaskFile = None,
    task_timeout: TaskTimeout = None,
    val: Val = None,
    test: Test = None,
    batch_size: BatchSize = None,
    trust_remote_code: TrustRemoteCode = False,
    lm_eval: LmEval = None,
    device: Device = "auto",
    seed: Seed = 0,
    worker_timeout: WorkerTimeout = TIMEOUT,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score files on the task's validation and test data, with their BatchNorm statistics."""
    from rich.table import Table
    from rich.text import Text

    from ckptavg.cli.terminal import Screen, console, stdout_for_data

    meeting = joined(device, worker_timeout)
    with meeting as workers, stdout_for_data(), Screen(quiet=quiet).watching() as watch:
        from ckptavg.pipeline.evaluation import evaluate
        from ckptavg.pipeline.task_choice import find_task

        given = val is not None or lm_eval is not None
        # the output often lies beside ./task.py
        source = task if given else find_task(task, [path for path in files if is_folder(path)])
        scored = evaluate(
            files, source, key=key, device=device, seed=seed, watch=watch, val=val, test=test,
            batch_size=batch_size, task_timeout=task_timeout, worker_timeout=worker_timeout, workers=workers,
            trust_remote_code=trust_remote_code, lm_eval=lm_eval,
        )  # fmt: skip
    if not workers.is_rank_zero:
        return
    rows: list[dict[str, Any]] = [
        {
            "path": str(path),
            **{
                split: {"loss": score.loss, "metric": score.metric, "examples": score.examples}
                for split, score in scores.items()
            },
        }
        for path, scores in scored
    ]
    if json:
        print(json_module.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    splits = list(scored[0][1])
    for split in splits:
        table.add_column(f"{split} metric", justify="right")
        table.add_column(f"{split} loss", justify="right")
    for path, scores in scored:
        cells = [
            cell
            for split in splits
            for cell in (
                "" if scores[split].metric is None else f"{scores[split].metric:.4f}",
                "" if scores[split].loss is None else f"{scores[split].loss:.4f}",
            )
        ]
        table.add_row(Text(printable(str(path))), *cells)
    console().print(table)
