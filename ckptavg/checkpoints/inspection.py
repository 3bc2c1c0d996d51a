"""Inspection of checkpoints: the candidates in training order and why other files are none. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptavg.checkpoints import stability
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.checksums import Manifest
from ckptavg.checkpoints.discover import Discovered, NotFinite, discover
from ckptavg.checkpoints.window import Window


def open_for_inspection(paths: Sequence[Path], window: Window, key: str | None, *, read_data: bool) -> Discovered:
    """Open the checkpoints under ``paths``, with bad ones among those left out; ``read_data`` reads all tensors."""
    manifest = Manifest()

    def check_data(checkpoint: Checkpoint) -> Mapping[str, NotFinite]:
        from ckptavg.checkpoints import integrity  # imports torch

        manifest.check(checkpoint)
        return integrity.check(checkpoint)

    found = discover(paths, window, key, bad="list", check=check_data if read_data else None)
    more = (*manifest.warnings, *stability.warnings(found.checkpoints))
    return replace(found, warnings=(*found.warnings, *more))


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts in a checkpoint's headers, by their names in the report."""
    dtypes = sorted({tensor.in_file[0] for tensor in checkpoint.tensors.values()})
    return {
        "path": str(checkpoint.path), "step": checkpoint.step, "step_from": checkpoint.step_from,
        "format": checkpoint.reader.format, "key": checkpoint.key, "tensors": len(checkpoint.tensors),
        "parameters": checkpoint.numel, "dtype": ", ".join(dtypes), "bytes": checkpoint.size,
        "notes": checkpoint.notes,
    }  # fmt: skip
