"""``ckptavg check``: try a task on one checkpoint before a long run."""

from pathlib import Path
from typing import Any

from ckptavg.cli.command import command_line, takes
from ckptavg.cli.options import NO_REPORT, SHARED
from ckptavg.errors import TaskError, printable
from ckptavg.options import CHECK


@takes(*(SHARED[name] for name in CHECK), *NO_REPORT)
def command(ckpts: list[Path], json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Run a task on one checkpoint: what it does, what a search would cost, and how to fix what is wrong."""
    from ckptavg.cli.terminal import Screen, console, stdout_for_data
    from ckptavg.report.as_json import to_json
    from ckptavg.report.layout import Sentence

    screen = Screen(quiet=quiet, verbose=verbose)
    with stdout_for_data(), screen.watching() as watch:
        from ckptavg.options import Options
        from ckptavg.pipeline.task_check import check_task
        from ckptavg.pipeline.task_choice import with_task

        checked = check_task(ckpts, with_task(Options(**options), ckpts, required=True), watch)
    if json:
        print(to_json(checked, command_line()))
    else:
        for line in checked.lines():
            console().print(Sentence(printable(line), indent=12))
    if checked.problems:
        more = f", and {len(checked.problems) - 1} more" if len(checked.problems) > 1 else ""
        raise TaskError(f"{checked.problems[0]}{more}")
