"""Record how to reproduce the output in its metadata, without timestamps, host names or absolute paths."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.runtime import version

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
    """Build the output's safetensors metadata: ``format`` for loaders, everything else as JSON under ``ckptavg``.

    Sources are the selected candidates with the SHA-256 of each of their files. Metadata entries that are equal in all
    selected candidates, such as safetensors' records of tied names, are kept.

    Args:
        checkpoints: all candidates.
        coefficients: their coefficients.
        strategy: name of the command.
        settings: settings of the command.
        dtype: the requested dtype, or None for the candidates' dtypes.
        adapter: how adapters were averaged.
        rank: the rank that an exact adapter was reduced to.
        not_averaged: the tensors copied from the last selected candidate.
        recomputed: the tensors recomputed from data (BatchNorm statistics).
        digest: returns the hexadecimal SHA-256 of a source file, or "".
    """
    selected = [(checkpoints[i], coefficients.candidate(i)) for i in coefficients.selected]
    record = {
        "schema": SCHEMA,
        "version": version.own(),
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
