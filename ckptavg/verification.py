"""Rebuild an output from the sources its metadata names, and compare bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptavg import provenance
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.discover import discover
from ckptavg.errors import InputError
from ckptavg.layout import model_tensors
from ckptavg.readers import Reader, RegularFile, StoredTensor, open_reader
from ckptavg.readers.safetensors import strict_json
from ckptavg.recipe import recipe


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found: ``agree`` tensors have the bytes they should have, ``differ`` do not.

    ``unchecked`` were recomputed from the task's data (BatchNorm statistics), which sources alone cannot tell.
    """

    agree: Sequence[str]
    differ: Sequence[str]
    unchecked: Sequence[str]


def verify(file: Path, sources: Path) -> Verification:
    """Recompute the average that ``file`` says it is from the checkpoints under ``sources``.

    Args:
        file: an output; of a sharded one the index.
        sources: where the checkpoints lie that it was made from.
    Raises:
        InputError: if it is no output of ckptavg, or a source is missing or has another SHA-256.
    """
    with ExitStack() as stack:
        output = open_reader(file)
        stack.callback(output.close)
        record = _record(output)
        checkpoints: list[Checkpoint] = []
        for source in record["sources"]:
            found = stack.enter_context(
                discover([_locate(source, sources, file)], key=source["key"] or None, allow_nonfinite=True)
            )
            checkpoints += found.checkpoints
        columns = [source["coefficient"] for source in record["sources"]]
        rows = zip(*(column if isinstance(column, list) else [column] for column in columns), strict=True)
        coefficients = Coefficients(
            tuple(tuple(float(c) for c in row) for row in rows), tuple(tuple(group) for group in record["groups"])
        )
        made = recipe(
            checkpoints, coefficients, dtype=record["dtype"],
            mode=record.get("adapter", "factors"), rank=record.get("rank"),
        )  # fmt: skip
        specs = made.specs
        _, stored, _ = model_tensors(output, None)
        if {name: (t.dtype, t.shape) for name, t in stored.items()} != {
            n: (t.dtype, t.shape) for n, t in specs.items()
        }:
            raise InputError("its tensors are not those of its sources", path=file)
        differ: set[str] = set()
        for name, offset, data in made.parts:
            if name not in differ and _bytes(output, stored[name], offset, len(data)) != data:
                differ.add(name)
        unchecked = sorted(record["recomputed"])
        return Verification(
            agree=sorted(specs.keys() - differ - set(unchecked)),
            differ=sorted(differ - set(unchecked)),
            unchecked=unchecked,
        )


def _record(output: Reader) -> Mapping[str, Any]:
    text = output.metadata.get(provenance.KEY)
    if text is None:
        raise InputError("has no ckptavg metadata, so it does not say what it was made from", path=output.path)
    try:
        record: Any = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its ckptavg metadata is not valid JSON: {error}", path=output.path) from error
    wanted = {"schema", "sources", "groups", "dtype", "recomputed"}
    if not isinstance(record, dict) or not wanted <= record.keys() or record["schema"] != provenance.SCHEMA:
        raise InputError("its ckptavg metadata is of another version", path=output.path, hint="use a newer ckptavg")
    return record


def _locate(source: Mapping[str, Any], folder: Path, output: Path) -> Path:
    """The checkpoint under ``folder`` that has the source's name and, file by file, its SHA-256."""
    name, digests = Path(source["name"]), source["sha256"]
    if not folder.is_dir():
        raise InputError("no such directory", path=folder)
    same_name = sorted(folder.rglob(name.name))
    if not same_name:
        raise InputError(f"no source {name} under {folder}", path=output, hint="--sources names their directory")
    for path in same_name:
        home = path if path.is_dir() else path.parent
        if all(_has_digest(home / part, digest) for part, digest in digests.items()):
            return path
    raise InputError("is not the file the average was made from: its SHA-256 differs", path=same_name[0])


def _has_digest(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    with RegularFile(path) as file:
        return provenance.sha256(file) == digest


def _bytes(reader: Reader, tensor: StoredTensor, offset: int, size: int) -> memoryview:
    data = bytearray(size)
    reader.read_into(tensor, offset * tensor.numel // max(1, tensor.nbytes), memoryview(data))
    return memoryview(data)
