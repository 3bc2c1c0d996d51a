"""``ckptavg inspect``: list the candidates in training order and why other files are none. Needs no torch."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ckptavg.checkpoints.window import Window
from ckptavg.cli.command import command as as_command
from ckptavg.cli.options import NO_REPORT
from ckptavg.declaration import CANDIDATES, Help, declared
from ckptavg.errors import InputError, printable
from ckptavg.options import shared

if TYPE_CHECKING:
    from ckptavg.checkpoints.checkpoint import Checkpoint
    from ckptavg.checkpoints.discover import Discovered


@dataclass(frozen=True, kw_only=True)
class _Settings:
    read_data: Annotated[
        bool, Help(CANDIDATES, "Read all data: check checksums, SHA256SUMS and NaN.", "Else only headers are read.")
    ] = False


def _run(
    ckpts: list[Path], key: str | None, read_data: bool, json: bool, quiet: bool, verbose: bool, **window: Any
) -> None:
    from ckptavg.checkpoints import stability
    from ckptavg.checkpoints.checksums import Manifest
    from ckptavg.checkpoints.discover import discover
    from ckptavg.report.as_json import plain

    manifest = Manifest()

    def check_data(checkpoint: Checkpoint) -> None:
        from ckptavg.checkpoints import integrity  # imports torch

        manifest.check(checkpoint)
        integrity.check(checkpoint)

    with discover(ckpts, Window(**window), key, bad="list", check=check_data if read_data else None) as found:
        warnings = (*found.warnings, *manifest.warnings, *stability.warnings(found.checkpoints))
        found = replace(found, warnings=warnings)
        rows = [_row(checkpoint) for checkpoint in found.checkpoints]
        if json:
            report = {"candidates": rows, "left_out": plain(found.left_out), "warnings": found.warnings}
            print(json_module.dumps(report, indent=2))
        else:
            _show(found, rows, quiet=quiet)
    if bad := sum(file.kind == "bad" for file in found.left_out):
        raise InputError(
            f"{bad} of {len(found.checkpoints) + bad} checkpoints cannot be read",
            hint="leave them out with --exclude; the commands that average also have --skip-bad",
        )
    if not found.checkpoints:
        raise InputError("no checkpoints found", path=", ".join(map(str, ckpts)))


command = as_command(
    _run,
    "inspect",
    "List the candidates and the reason for each file left out.",
    [*declared(Window), *(option for option in shared() if option.name == "key"), *declared(_Settings), *NO_REPORT],
)


def _row(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "step_from": checkpoint.step_from,
        "format": checkpoint.reader.format,
        "key": checkpoint.key,
        "tensors": len(checkpoint.tensors),
        "parameters": checkpoint.numel,
        "dtype": ", ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()})),
        "bytes": checkpoint.size,
        "notes": checkpoint.notes,
    }


def _show(found: Discovered, rows: Sequence[dict[str, Any]], *, quiet: bool) -> None:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from ckptavg.cli.terminal import console

    screen = console()
    table = Table(box=None, pad_edge=False)
    headings = ["candidate", "step", "format", "key", "tensors", "parameters", "dtype", "size"]
    if not any(row["key"] for row in rows):
        headings.remove("key")
    for heading in headings:
        right = heading in ("step", "tensors", "parameters", "size")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for checkpoint, row in zip(found.checkpoints, rows, strict=True):
        cells = row | {
            "candidate": checkpoint.path.name,
            "key": checkpoint.key or "·",
            "parameters": f"{checkpoint.numel:,}",
            "size": decimal(checkpoint.size),
        }
        table.add_row(*(Text(printable(str(cells[heading]))) for heading in headings))
    screen.print(table)
    if quiet:
        return
    if found.checkpoints:
        screen.print(Text(f"steps from {found.checkpoints[0].step_from}", style="dim"))
    styles = {"bad": "red", "warning": "yellow"}
    for file in found.left_out:
        name = "" if file.kind == "bad" else f"{file.path.name}: "  # an error message starts with its file
        text = Text(printable(f"left out {name}{file.reason}"), style=styles.get(file.kind, "dim"))
        screen.print(text, soft_wrap=True)
    notes = (note for checkpoint in found.checkpoints for note in checkpoint.notes)
    for note in dict.fromkeys((*found.warnings, *notes)):
        screen.print(Text(printable(note), style="yellow"), soft_wrap=True)
