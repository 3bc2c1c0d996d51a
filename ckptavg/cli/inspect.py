"""``ckptavg inspect``: list the candidates in training order and why other files are none. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckptavg.checkpoints.window import Window
from ckptavg.cli.command import takes
from ckptavg.cli.options import NO_REPORT, SHARED
from ckptavg.declaration import CANDIDATES, Help, Option, declared
from ckptavg.errors import InputError, printable

if TYPE_CHECKING:
    from ckptavg.checkpoints.discover import Discovered

_HELP: Final = Help(CANDIDATES, "Read all data: check checksums, SHA256SUMS and NaN.", "Else only headers are read.")
_READ_DATA: Final = Option("read_data", bool, False, _HELP)


@takes(*declared(Window), SHARED["key"], _READ_DATA, *NO_REPORT)
def command(
    ckpts: list[Path], key: str | None, read_data: bool, json: bool, quiet: bool, verbose: bool, **window: Any
) -> None:
    """List the candidates and the reason for each file left out."""
    from ckptavg.checkpoints.inspection import facts, open_for_inspection
    from ckptavg.report.result import Inspection

    with open_for_inspection(ckpts, Window(**window), key, read_data=read_data) as found:
        rows = [facts(checkpoint) for checkpoint in found.checkpoints]
        if json:
            print(
                Inspection(
                    layout=found.layout, candidates=rows, left_out=found.left_out, warnings=found.warnings
                ).to_json()
            )
        else:
            _show(found, rows, quiet=quiet)
    if bad := sum(file.kind == "bad" for file in found.left_out):
        hint = "leave them out with --exclude; the commands that average also have --skip-bad"
        hint = hint if found.checkpoints else None
        raise InputError(f"{bad} of {len(found.checkpoints) + bad} checkpoints cannot be read", hint=hint)
    if not found.checkpoints:
        raise InputError("no checkpoints found", path=", ".join(map(str, ckpts)))


def _show(found: Discovered, rows: Sequence[dict[str, Any]], *, quiet: bool) -> None:
    from rich.filesize import decimal
    from rich.text import Text

    from ckptavg.checkpoints.checkpoint import shortest_names
    from ckptavg.checkpoints.inspection import left_out_lines
    from ckptavg.cli.terminal import console
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
        screen.print(Text(printable(line), style=styles.get(kind, "dim")), soft_wrap=True)
    notes = (note for checkpoint in found.checkpoints for note in checkpoint.notes)
    for note in dict.fromkeys((*found.warnings, *notes)):
        screen.print(Text(printable(note), style="yellow"), soft_wrap=True)
