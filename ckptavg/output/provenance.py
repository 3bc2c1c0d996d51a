"""Record how to reproduce the output in its metadata, without timestamps, host names or absolute paths."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.output import data_digest
from ckptavg.runtime import version

KEY: Final = "ckptavg"
SCHEMA: Final = 2
"""Schema 1, which versions up to 0.1 wrote, has ``sha256`` in place of a source's ``digests``, without algorithms."""
DRAWN: Final = "swag"
"""The strategy that the metadata of a draw record; its settings are those of `ckptavg.average.gaussian.Draw`."""


def metadata(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, digest: Callable[[RegularFile], str], **recipe: Any
) -> dict[str, str]:
    """Build the output's safetensors metadata: ``format`` for loaders, everything else as JSON under ``ckptavg``.

    Sources are the selected candidates with the digest of each of their files. Metadata entries that are equal in all
    selected candidates, such as safetensors' records of tied names, are kept.

    Args:
        digest: returns the digest of a source file, such as ``blake3:af13…``, or "".
        recipe: the other entries: strategy (name of the command) and its settings; dtype, adapter and rank as
            requested; not_averaged, the tensors copied from the last selected candidate, and the patterns keep and
            average that chose some of them; recomputed, those computed from data (BatchNorm statistics); derived, if
            there are any, kind → tensors that are functions of others (`ckptavg.checkpoints.derived`); runs, the run of
            each source, if the strategy averages by run.
    """
    selected = [(checkpoints[i], coefficients.candidate(i)) for i in coefficients.selected]
    record = recipe | {
        "schema": SCHEMA,
        "version": version.own(),
        "groups": coefficients.groups,
        "sources": [
            {
                "name": checkpoint.name,
                "step": checkpoint.step,
                "key": checkpoint.key,
                "coefficient": coefficient,
                "digests": {name: digest(file) for name, file in checkpoint.reader.named_files.items()},
            }
            for checkpoint, coefficient in selected
        ],
    }
    first, *others = (checkpoint.reader.metadata for checkpoint, _ in selected)
    kept = {
        name: value for name, value in first.items()
        if name not in (KEY, data_digest.KEY) and all(other.get(name) == value for other in others)
    }  # fmt: skip
    return {**kept, "format": "pt", KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))}
