"""``ckptavg inspect``: list the candidates in training order and why other files are none. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckptavg.checkpoints.window import Window
from ckptavg.cli.command import command_line, reports
from ckptavg.declaration import MAIN, Help, Option, declared
from ckptavg.errors import InputError, printable
from ckptavg.options import NOT_INSPECT, Options, config_file
from ckptavg.options.task import check_unscored
from ckptavg.runtime.workers import ALONE, joined

if TYPE_CHECKING:
    from ckptavg.checkpoints.discover import Discovered
    from ckptavg.report.basin import Basins

_OWN: Final = (
    Option("basin", bool, False, Help(MAIN, "Score midpoints too: which candidates average?", "Needs a task.")),
    Option("read_data", bool, False, Help(MAIN, "Read all data: check checksums, SHA256SUMS and NaN.")),
)


@reports(_OWN, without=(*NOT_INSPECT, "report"))
def command(
    ckpts: list[Path], basin: bool, read_data: bool, json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """List the candidates and the reason for each file left out."""
    from ckptavg.checkpoints.inspection import facts, open_for_inspection
    from ckptavg.report.as_json import to_json
    from ckptavg.report.result import Inspection

    if not basin:
        file = config_file.read(Path())  # it and the environment have the options of other commands too
        default = {name for name in options if name in file or f"CKPTAVG_{name.upper()}" in os.environ} - {"task"}
        check_unscored({name: value for name, value in options.items() if name not in default})
    window = Window(**{option.name: options[option.name] for option in declared(Window)})
    with joined(options["device"], options["worker_timeout"]) if basin else nullcontext(ALONE) as workers:
        with open_for_inspection(ckpts, window, options["key"], read_data=read_data) as found:
            rows = [facts(checkpoint) for checkpoint in found.checkpoints]
            shown = Inspection(layout=found.layout, candidates=rows, left_out=found.left_out, warnings=found.warnings)
            if workers.is_rank_zero and not json:
                _show(found, rows, quiet=quiet)
        error = None if options["skip_bad"] and found.checkpoints else _error(ckpts, found)
        if basin and error is None:
            shown = replace(shown, basin=_basins(ckpts, Options(**options, workers=workers), quiet, verbose))
    if workers.is_rank_zero and json:
        print(to_json(shown, command_line(workers.world_size)))
    elif workers.is_rank_zero and shown.basin is not None:
        from rich.console import Group

        from ckptavg.cli.terminal import console
        from ckptavg.report.basin import render

        console().print(Group("", *render(shown.basin)))
    if error is not None:
        raise error


def _basins(ckpts: Sequence[Path], options: Options, quiet: bool, verbose: bool) -> Basins:
    from ckptavg.cli.terminal import Screen, stdout_for_data

    with stdout_for_data(), Screen(quiet=quiet, verbose=verbose).watching() as watch:
        from ckptavg.pipeline.basin import find_basins
        from ckptavg.pipeline.task_choice import with_task

        return find_basins(ckpts, with_task(options, ckpts, required=True), watch)


def _error(ckpts: Sequence[Path], found: Discovered) -> InputError | None:
    """Return the error if checkpoints are bad, or there are none."""
    if bad := sum(file.kind == "bad" for file in found.left_out):
        hint = "leave them out with --exclude, or all of them with --skip-bad"
        hint = hint if found.checkpoints else None
        return InputError(f"{bad} of {len(found.checkpoints) + bad} checkpoints cannot be read", hint=hint)
    return None if found.checkpoints else InputError("no checkpoints found", path=", ".join(map(str, ckpts)))


def _show(found: Discovered, rows: Sequence[dict[str, Any]], *, quiet: bool) -> None:
    from rich.filesize import decimal
    from rich.text import Text

    from ckptavg.checkpoints.checkpoint import shortest_names
    from ckptavg.checkpoints.inspection import left_out_lines
    from ckptavg.cli.terminal import console, show_message
    from ckptavg.report.layout import FittedTable

    screen = console()
    headings = ["candidate", "run", "step", "format", "key", "tensors", "parameters", "dtype", "size"]
    if not any(row["key"] for row in rows):
        headings.remove("key")
    if len({row["run"] for row in rows}) < 2:
        headings.remove("run")
    names = shortest_names([checkpoint.path for checkpoint in found.checkpoints])
    cells = [
        row | {"candidate": name, "key": checkpoint.key or "·", "parameters": f"{checkpoint.numel:,}"}
        | {"size": decimal(checkpoint.size), "step": row["step"] if checkpoint.step_from else "?"}
        for name, checkpoint, row in zip(names, found.checkpoints, rows, strict=True)
    ]  # fmt: skip
    lines = [[printable(str(row[heading])) for heading in headings] for row in cells]
    screen.print(FittedTable(title="", headings=headings, rows=lines, left=("format", "key", "dtype")))
    if quiet:
        return
    if found.checkpoints:
        step_from = found.checkpoints[0].step_from
        screen.print(Text(f"{found.layout}{f'; steps from {step_from}' if step_from else ''}", style="dim"))
    styles = {"bad": "red", "warning": "yellow"}
    for kind, line in left_out_lines(found.left_out):
        show_message(screen, printable(line), styles.get(kind, "dim"))
    notes = (note for checkpoint in found.checkpoints for note in checkpoint.notes)
    for note in dict.fromkeys((*found.warnings, *notes)):
        show_message(screen, printable(note), "yellow")
