"""Inspection of checkpoints: the candidates in training order and why other files are none. Needs no torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ckptavg.checkpoints import stability
from ckptavg.checkpoints.checkpoint import Checkpoint, shortest_names
from ckptavg.checkpoints.checksums import Manifest
from ckptavg.checkpoints.components import LeftOut
from ckptavg.checkpoints.discover import Discovered, NotFinite, discover
from ckptavg.checkpoints.window import Window

_EXAMPLES: Final = 3  # files shown for each reason


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


def left_out_lines(left_out: Sequence[LeftOut]) -> Iterator[tuple[str, str]]:
    """Yield the kind of each reason, and a line with up to three files that were left out for it."""
    groups: dict[tuple[str, str], list[tuple[str, LeftOut]]] = {}
    for name, one in zip(shortest_names([one.path for one in left_out]), left_out, strict=True):
        reason = one.reason.replace(str(one.path), "FILE")
        key = one.kind, re.sub(r"(is a link to|holds the same weights as) .*", r"\1", reason)
        groups.setdefault(key, []).append((name, one))
    for (kind, _), same in groups.items():
        for name, one in same[:_EXAMPLES]:
            # an error message starts with its file
            yield kind, f"left out {'' if kind == 'bad' else f'{name}: '}{one.reason}"
        if len(same) > _EXAMPLES:
            yield kind, f"and {len(same) - _EXAMPLES} more for this reason"
        if hint := same[0][1].hint:
            yield kind, f"hint: {hint}"


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts in a checkpoint's headers, by their names in the report."""
    dtypes = sorted({tensor.in_file[0] for tensor in checkpoint.tensors.values()})
    return {
        "path": str(checkpoint.path), "step": checkpoint.step, "step_from": checkpoint.step_from,
        "format": checkpoint.reader.format, "key": checkpoint.key, "tensors": len(checkpoint.tensors),
        "parameters": checkpoint.numel, "dtype": ", ".join(dtypes), "bytes": checkpoint.size,
        "run": checkpoint.run + 1, "notes": checkpoint.notes,
    }  # fmt: skip
