"""``ckptavg inspect``: list the candidates in training order and why other files are none. Needs no torch."""

from __future__ import annotations

import json as json_module
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

    manifest = Manifest()

    def check_data(checkpoint: Checkpoint) -> None:
        from ckptavg.checkpoints import integrity  # imports torch

        manifest.check(checkpoint)
        integrity.check(checkpoint)

    with discover(ckpts, Window(**window), key, bad="list", check=check_data if read_data else None) as found:
        warnings = (*manifest.warnings, *stability.warnings(found.checkpoints))
        found = replace(found, warnings=(*found.warnings, *warnings))
        if json:
            print(json_module.dumps(_to_dict(found), indent=2))
        else:
            _show(found, quiet=quiet)
    bad = [file for file in found.left_out if file.kind == "bad"]
    if bad:
        raise InputError(
            f"{len(bad)} of {len(found.checkpoints) + len(bad)} checkpoints cannot be read",
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


def _dtypes(checkpoint: Checkpoint) -> str:
    return ", ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))


def _to_dict(found: Discovered) -> dict[str, Any]:
    return {
        "candidates": [
            {
                "path": str(checkpoint.path),
                "step": checkpoint.step,
                "step_from": checkpoint.step_from,
                "format": checkpoint.format,
                "key": checkpoint.key,
                "tensors": len(checkpoint.tensors),
                "parameters": checkpoint.numel,
                "dtype": _dtypes(checkpoint),
                "bytes": checkpoint.size,
                "notes": list(checkpoint.notes),
            }
            for checkpoint in found.checkpoints
        ],
        "left_out": [{"path": str(file.path), "reason": file.reason, "kind": file.kind} for file in found.left_out],
        "warnings": list(found.warnings),
    }


def _show(found: Discovered, *, quiet: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from ckptavg.cli.terminal import console

    screen = console()
    table = Table(box=None, pad_edge=False)
    keyed = any(checkpoint.key for checkpoint in found.checkpoints)
    table.add_column("candidate", no_wrap=True)
    for heading in ("step", "format", *(("key",) if keyed else ()), "tensors", "parameters", "dtype", "size"):
        right = heading in ("step", "tensors", "parameters", "size")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for checkpoint in found.checkpoints:
        key = (checkpoint.key or "·",) if keyed else ()
        cells = (
            checkpoint.path.name,
            checkpoint.step,
            checkpoint.format,
            *key,
            len(checkpoint.tensors),
            f"{checkpoint.numel:,}",
            _dtypes(checkpoint),
            _size(checkpoint.size),
        )
        table.add_row(*(Text(printable(str(cell))) for cell in cells))
    screen.print(table)
    if quiet:
        return
    if found.checkpoints:
        screen.print(Text(f"steps from {found.checkpoints[0].step_from}", style="dim"))
    styles = {"bad": "red", "warning": "yellow"}
    for file in found.left_out:
        name = "" if file.kind == "bad" else f"{file.path.name}: "  # an error message starts with its file
        screen.print(
            Text(printable(f"left out {name}{file.reason}"), style=styles.get(file.kind, "dim")), soft_wrap=True
        )
    for note in dict.fromkeys(
        (*found.warnings, *(note for checkpoint in found.checkpoints for note in checkpoint.notes))
    ):
        screen.print(Text(printable(note), style="yellow"), soft_wrap=True)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
