"""What a stranger needs to rebuild the output: written into its metadata, without clock, host or absolute path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from threading import Event
from typing import Any, Final

from ckptavg import interrupt
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.readers import RegularFile

KEY: Final = "ckptavg"
SCHEMA: Final = 1
_CHUNK: Final = 1 << 20


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
        digest: the SHA-256 of a source's file, in hexadecimal.
    """
    selected = [(checkpoints[i], coefficients.candidate(i)) for i in coefficients.selected]
    record = {
        "schema": SCHEMA,
        "version": version("ckptavg"),
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


def unknown(_: RegularFile) -> str:
    """In place of a SHA-256 that is not known yet, as long as one."""
    return "0" * 64


@contextmanager
def hashing(files: Iterable[RegularFile], threads: int) -> Generator[Callable[[RegularFile], str]]:
    """Find the SHA-256 of open files in threads of its own, while something else is done; ends with that.

    Yields:
        The SHA-256 of one of ``files``, which waits until it is known.
    """
    stop = Event()
    with ThreadPoolExecutor(threads) as pool:
        try:
            found = {file: pool.submit(sha256, file, stop) for file in files}
            yield lambda file: interrupt.result(found[file])
        finally:
            stop.set()


def sha256(file: RegularFile, stop: Event | None = None) -> str:
    """The SHA-256 of an open file, in hexadecimal, found once; empty if ``stop`` was set meanwhile."""
    if file.sha256 is not None:
        return file.sha256
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    for start in range(0, file.size, _CHUNK):
        if stop and stop.is_set():
            return ""
        part = buffer[: min(_CHUNK, file.size - start)]
        file.read_into(start, part)
        digest.update(part)
    file.sha256 = digest.hexdigest()
    return file.sha256
