"""``ckptavg eval``: the score of files as they are."""

from __future__ import annotations

import json as json_module
import sys
from contextlib import redirect_stdout
from typing import Any

from rich.table import Table
from rich.text import Text

from ckptavg.cli.options import Device, Json, Key, Paths, Quiet, Seed, TaskFile, Verbose
from ckptavg.cli.terminal import Screen, console
from ckptavg.errors import UsageError, printable


def command(
    files: Paths,
    key: Key = None,
    task: TaskFile = None,
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score files on the task's validation and test data, with their own BatchNorm statistics."""
    with redirect_stdout(sys.stderr), Screen(quiet=quiet).watching() as watch:
        from ckptavg.evaluation import evaluate
        from ckptavg.tasks.find import find

        source = find(task, [path for path in files if path.is_dir()])  # an output beside ./task.py is usual
        if source is None:
            raise UsageError("scoring needs a task file", hint="`ckptavg init` writes ./task.py")
        scored = evaluate(files, source, key=key, device=device, seed=seed, watch=watch)
    rows: list[dict[str, Any]] = [
        {
            "path": str(path),
            **{
                split: {"loss": one.loss, "metric": one.metric, "examples": one.examples}
                for split, one in scores.items()
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
                f"{scores[split].loss:.4f}",
            )
        ]
        table.add_row(Text(printable(str(path))), *cells)
    console().print(table)
