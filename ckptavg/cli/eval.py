"""``ckptavg eval``: score checkpoint files as they are."""

from pathlib import Path
from typing import Any

from ckptavg.cli.command import command_line, takes
from ckptavg.cli.options import NO_REPORT, SHARED
from ckptavg.options import EVAL, Options
from ckptavg.runtime.workers import joined


@takes(*(SHARED[name] for name in EVAL), *NO_REPORT)
def command(ckpts: list[Path], json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Score files on the task's validation and test data, with their BatchNorm statistics."""
    from ckptavg.cli.terminal import Screen, console, stdout_for_data
    from ckptavg.report.as_json import to_json

    meeting = joined(options["device"], options["worker_timeout"])
    with meeting as workers, stdout_for_data(), Screen(quiet=quiet).watching() as watch:
        from ckptavg.pipeline.evaluation import evaluate

        scored = evaluate(ckpts, Options(**options, workers=workers), watch)
    if not workers.is_rank_zero:
        return
    if json:
        print(to_json(scored, command_line(workers.world_size)))
    else:
        console().print(scored)
