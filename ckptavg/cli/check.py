"""``ckptavg check``: try a task on one checkpoint before a long run."""

import json as json_module
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckptavg.cli.command import takes
from ckptavg.cli.options import NO_REPORT, SHARED
from ckptavg.errors import TaskError, printable

if TYPE_CHECKING:
    from ckptavg.pipeline.task_check import TaskCheck

_OPTIONS: Final = (
    "task", "val", "device", "last", "task_timeout", "train", "test", "holdout", "batch_size", "labels", "max_length",
    "base", "trust_remote_code", "include", "exclude", "start", "stop", "every", "key", "seed", "bits", "group_size",
    "offload",
)  # fmt: skip


@takes(*(SHARED[name] for name in _OPTIONS), *NO_REPORT)
def command(ckpts: list[Path], json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Run a task on one checkpoint: what it does, what a search would cost, and how to fix what is wrong."""
    from ckptavg.cli.terminal import Screen, stdout_for_data

    screen = Screen(quiet=quiet, verbose=verbose)
    with stdout_for_data(), screen.watching() as watch:
        from ckptavg.options import Options
        from ckptavg.pipeline.task_check import check_task
        from ckptavg.pipeline.task_choice import with_task
        from ckptavg.report.as_json import plain

        checked = check_task(ckpts, with_task(Options(**options), ckpts, required=True), watch)
    if json:
        print(json_module.dumps(plain(checked), indent=2))
    else:
        print("\n".join(printable(line) for line in _lines(checked)))
    if checked.problems:
        more = f", and {len(checked.problems) - 1} more" if len(checked.problems) > 1 else ""
        raise TaskError(f"{checked.problems[0]}{more}")


def _lines(checked: "TaskCheck") -> Iterator[str]:
    yield f"checkpoint  {checked.checkpoint}, the last of {checked.candidates} candidates"
    yield f"model       {checked.model}"
    yield f"loss        {checked.loss}"
    yield f"metric      {checked.metric or 'none: scores are of the loss'}"
    for name, split in checked.splits.items():
        figures = {"loss": split.loss, "metric": split.metric}
        scored = "".join(f", {kind} {value:.4f}" for kind, value in figures.items() if value is not None)
        repeated = "" if split.repeats else ", other examples or order in every pass"
        unit = "a score" if scored else "to read"
        counts = f"{split.examples:,} examples in {split.batches:,} batches, {split.seconds:.2f} s {unit}"
        yield f"{name:<11} {counts}{scored}{repeated}"
    searches = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in checked.searches.items())
    yield f"searches    about {searches}, of {checked.candidates} candidates"
    yield f"memory      {checked.memory}"
    for kind, lines in (("problem", checked.problems), ("remark", checked.remarks)):
        for line in lines:
            yield f"{kind}: {line}"
    if not checked.problems:
        yield "The task works." if not checked.remarks else "The task works; see the remarks."
