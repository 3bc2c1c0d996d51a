"""What a stranger needs to rebuild the output: written into its metadata, without clock, host or absolute path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import ckptavg
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.filesystem.regular_file import RegularFile

KEY: Final = "ckptavg"
SCHEMA: Final = 1


def metadata(
    checkpoints: Sequence[Checkpoint],
    coefficients: Coefficients,
    strategy: str,
    settings: Mapping[str, Any],
    *,
    dtype: str | None,
    adapter: str = "factors",
    rank: int | None = None,
    not_averaged: Sequence[str],
    recomputed: Sequence[str],
    digest: Callable[[RegularFile], str],
) -> dict[str, str]:
    """The output's safetensors metadata: ``format`` for loaders, and everything else as JSON under ``ckptavg``.

    Sources are the selected candidates with the SHA-256 of each of their files. Entries that all selected candidates
    carry with the same value, such as safetensors' records of tied names, are kept.

    Args:
        checkpoints: all candidates.
        coefficients: theirs.
        strategy: the command's name.
        settings: its settings.
        dtype: the dtype asked for, or None for the candidates' own.
        adapter: how adapters were averaged.
        rank: what an exact one was reduced to.
        not_averaged: the tensors taken from the last selected candidate.
        recomputed: the tensors recomputed from data (BatchNorm statistics).
        digest: the SHA-256 of a source's file, in hexadecimal, or "".
    """
    selected = [(checkpoints[i], coefficients.candidate(i)) for i in coefficients.selected]
    record = {
        "schema": SCHEMA,
        "version": ckptavg.__version__,
        "strategy": strategy,
        "settings": dict(settings),
        "dtype": dtype,
        "adapter": adapter,
        "rank": rank,
        "groups": [list(prefixes) for prefixes in coefficients.groups],
        "not_averaged": list(not_averaged),
        "recomputed": list(recomputed),
        "sources": [
            {
                "name": checkpoint.name,
                "step": checkpoint.step,
                "key": checkpoint.key,
                "coefficient": coefficient,
                "sha256": {file.path.name: digest(file) for file in checkpoint.reader.files},
            }
            for checkpoint, coefficient in selected
        ],
    }
    first = selected[0][0].reader.metadata
    kept = {
        name: value
        for name, value in first.items()
        if name != KEY and all(checkpoint.reader.metadata.get(name) == value for checkpoint, _ in selected)
    }
    return {**kept, "format": "pt", KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))}
