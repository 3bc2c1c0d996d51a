"""``ckptavg inspect``: what there is, in training order, and why the rest is no candidate. Needs no torch."""

from __future__ import annotations

import json as json_module
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from ckptavg.cli.options import Every, Exclude, Include, Json, Key, LastN, Paths, Quiet, Start, Stop, Verbose, option
from ckptavg.errors import InputError, printable

if TYPE_CHECKING:
    from ckptavg.checkpoints.checkpoint import Checkpoint
    from ckptavg.checkpoints.discover import Discovered

ReadData = Annotated[
    bool, option("Candidates", "Read files to their ends too: checksums, SHA256SUMS, NaN.", "--read-data")
]


def command(
    ckpts: Paths,
    include: Include = None,
    exclude: Exclude = None,
    start: Start = None,
    stop: Stop = None,
    every: Every = None,
    last: LastN = None,
    key: Key = None,
    read_data: ReadData = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the candidates and the reason for each file left out."""
    from ckptavg.checkpoints import stability
    from ckptavg.checkpoints.checksums import Manifest
    from ckptavg.checkpoints.discover import discover
    from ckptavg.checkpoints.window import Window

    window = Window(include=include, exclude=exclude, start=start, stop=stop, every=every, last=last)
    manifest = Manifest()

    def whole(checkpoint: Checkpoint) -> None:
        from ckptavg.checkpoints import integrity  # and torch with it

        manifest.check(checkpoint)
        integrity.check(checkpoint)

    with discover(ckpts, window, key, bad="list", check=whole if read_data else None) as found:
        doubts = (*manifest.doubts, *stability.warnings(found.checkpoints))
        found = replace(found, warnings=(*found.warnings, *doubts))
        if json:
            print(json_module.dumps(_to_dict(found), indent=2))
        else:
            _show(found, quiet=quiet)
    bad = [one for one in found.left_out if one.kind == "bad"]
    if bad:
        raise InputError(
            f"{len(bad)} of {len(found.checkpoints) + len(bad)} checkpoints cannot be read",
            hint="leave them out with --exclude, or all of them with --skip-bad",
        )
    if not found.checkpoints:
        raise InputError("no checkpoints found", path=", ".join(map(str, ckpts)))


def _dtypes(checkpoint: Checkpoint) -> str:
    return ", ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))


def _to_dict(found: Discovered) -> dict[str, Any]:
    return {
        "candidates": [
            {
                "path": str(one.path),
                "step": one.step,
                "step_from": one.step_from,
                "format": one.format,
                "key": one.key,
                "tensors": len(one.tensors),
                "parameters": one.numel,
                "dtype": _dtypes(one),
                "bytes": one.size,
                "notes": list(one.notes),
            }
            for one in found.checkpoints
        ],
        "left_out": [{"path": str(one.path), "reason": one.reason, "kind": one.kind} for one in found.left_out],
        "warnings": list(found.warnings),
    }


def _show(found: Discovered, *, quiet: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from ckptavg.cli.terminal import console

    screen = console()
    table = Table(box=None, pad_edge=False)
    keyed = any(one.key for one in found.checkpoints)
    table.add_column("candidate", no_wrap=True)
    for heading in ("step", "format", *(("key",) if keyed else ()), "tensors", "parameters", "dtype", "size"):
        right = heading in ("step", "tensors", "parameters", "size")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for one in found.checkpoints:
        key = (one.key or "·",) if keyed else ()
        cells = (
            one.path.name,
            one.step,
            one.format,
            *key,
            len(one.tensors),
            f"{one.numel:,}",
            _dtypes(one),
            _size(one.size),
        )
        table.add_row(*(Text(printable(str(cell))) for cell in cells))
    screen.print(table)
    if quiet:
        return
    if found.checkpoints:
        screen.print(Text(f"steps from {found.checkpoints[0].step_from}", style="dim"))
    styles = {"bad": "red", "warning": "yellow"}
    for one in found.left_out:
        where = "" if one.kind == "bad" else f"{one.path.name}: "  # an error names its file itself
        screen.print(
            Text(printable(f"left out {where}{one.reason}"), style=styles.get(one.kind, "dim")), soft_wrap=True
        )
    for note in dict.fromkeys((*found.warnings, *(note for one in found.checkpoints for note in one.notes))):
        screen.print(Text(printable(note), style="yellow"), soft_wrap=True)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
