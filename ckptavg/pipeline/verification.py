"""Verification: rebuild an output from the sources in its metadata, and compare bytes."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckptavg.average import plan_output
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.dtypes import FLOATING, NAMES
from ckptavg.checkpoints.state_dict import check_agreement, model_tensors
from ckptavg.coefficients import Coefficients
from ckptavg.errors import InputError
from ckptavg.filesystem import sha256
from ckptavg.filesystem.regular_file import RegularFile, is_file, is_folder
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.output import provenance
from ckptavg.readers import Reader, open_reader


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Names of tensors by outcome: ``agree`` have the expected bytes, ``differ`` do not.

    ``unchecked`` were recomputed from the task's data (BatchNorm statistics) and cannot be rebuilt from the sources.
    """

    agree: Sequence[str]
    differ: Sequence[str]
    unchecked: Sequence[str]


def verify(file: Path, sources: Path) -> Verification:
    """Recompute the average recorded in the metadata of ``file`` from the checkpoints under ``sources``.

    Args:
        file: an output; for a sharded output its index.
        sources: directory of the source checkpoints.
    Raises:
        InputError: if ``file`` is not an output of ckptavg, or a source is missing or has another SHA-256.
    """
    with ExitStack() as stack:
        output = stack.enter_context(closing(open_reader(file)))
        record = _record(output)
        checkpoints: list[Checkpoint] = []
        for source in record["sources"]:
            path = _locate(source, sources, file)
            found = stack.enter_context(discover([path], key=source["key"] or None, allow_nonfinite=True))
            if len(found.checkpoints) != 1:
                raise InputError(f"holds {len(found.checkpoints)} checkpoints instead of one", path=path)
            checkpoints += found.checkpoints
        check_agreement(checkpoints)
        coefficients = _coefficients(record, checkpoints[0], file)
        mode = record.get("adapter", "factors")
        checkpoints = [replace(c, kept=frozenset(record.get("not_averaged", ()))) for c in checkpoints]
        plan = plan_output(checkpoints, coefficients, dtype=record["dtype"], mode=mode, rank=record.get("rank"))
        _, stored, _ = model_tensors(output, None)
        expected, actual = ({name: (t.dtype, t.shape) for name, t in ts.items()} for ts in (plan.specs, stored))
        if actual != expected:
            raise InputError("its tensors differ from its sources in name, dtype or shape", path=file)
        differ: set[str] = set()
        for name, offset, data in plan.parts:
            tensor, written = stored[name], memoryview(bytearray(len(data)))
            output.read_into(tensor, offset * tensor.numel // max(1, tensor.nbytes), written)
            if written != data:
                differ.add(name)
        unchecked = set(record["recomputed"])
        agree = plan.specs.keys() - differ - unchecked
        return Verification(agree=sorted(agree), differ=sorted(differ - unchecked), unchecked=sorted(unchecked))


def _record(output: Reader) -> Mapping[str, Any]:
    text = output.metadata.get(provenance.KEY)
    if text is None:
        raise InputError("has no ckptavg metadata, so its sources are unknown", path=output.path)
    try:
        record: Any = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its ckptavg metadata is not valid JSON: {error}", path=output.path) from error
    if not isinstance(record, dict) or record.get("schema") != provenance.SCHEMA:
        raise InputError("its ckptavg metadata is of another version", path=output.path, hint="use a newer ckptavg")
    if not _is_complete(record):
        raise InputError("its ckptavg metadata is damaged", path=output.path)
    return record


def _is_complete(record: Mapping[str, Any]) -> bool:
    """Return whether every entry used here is present with the right type; the metadata is untrusted input."""
    sources, dtype, rank = record.get("sources"), record.get("dtype"), record.get("rank")
    return (
        isinstance(sources, list)
        and len(sources) > 0
        and all(map(_is_source, sources))
        and _are_texts(record.get("recomputed"))
        and _are_texts(record.get("not_averaged", []))
        and isinstance(groups := record.get("groups"), list)
        and all(map(_are_texts, groups))
        and "dtype" in record
        and (dtype is None or (isinstance(dtype, str) and NAMES.get(dtype) in FLOATING))
        and record.get("adapter", "factors") in ("factors", "exact")
        and (rank is None or (type(rank) is int and rank > 0))
    )


def _is_source(source: Any) -> bool:
    digests: Any = source.get("sha256") if isinstance(source, dict) else None
    return (
        isinstance(digests, dict)
        and len(digests) > 0
        and all(Path(part).name == part and isinstance(digest, str) for part, digest in digests.items())
        and isinstance(source.get("name"), str)
        and Path(source["name"]).name not in ("", "..")
        and isinstance(source.get("key"), str)
        and all(type(c) in (int, float) for c in _column(source.get("coefficient")))
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _column(coefficient: Any) -> list[Any]:
    return coefficient if isinstance(coefficient, list) else [coefficient]


def _coefficients(record: Mapping[str, Any], first: Checkpoint, output: Path) -> Coefficients:
    try:
        rows = zip(*(_column(source["coefficient"]) for source in record["sources"]), strict=True)
        values = tuple(tuple(float(c) for c in row) for row in rows)
        coefficients = Coefficients(values, tuple(tuple(group) for group in record["groups"]))
        for name in (name for name, spec in first.tensors.items() if spec.dtype in FLOATING):
            coefficients.row(name)
    except (ValueError, OverflowError) as error:
        raise InputError(f"its ckptavg metadata is damaged: {error}", path=output) from error
    return coefficients


def _locate(source: Mapping[str, Any], folder: Path, output: Path) -> Path:
    """Find the checkpoint under ``folder`` with the name and, where recorded, the SHA-256 digests of ``source``."""
    name, digests = Path(source["name"]), source["sha256"]
    if not is_folder(folder):
        raise InputError("no such directory", path=folder)
    same_name = sorted(Path(parent) / name.name for parent, dirs, files in os.walk(folder) if name.name in dirs + files)
    if not same_name:
        hint = "pass the directory of the sources with --sources"
        raise InputError(f"no source {name} under {folder}", path=output, hint=hint)
    for path in same_name:
        home = path if is_folder(path) else path.parent
        if all(_has_digest(home / part, digest) for part, digest in digests.items()):
            return path
    raise InputError("is not the file the average was made from: its SHA-256 differs", path=same_name[0])


def _has_digest(path: Path, digest: str) -> bool:
    if not is_file(path):
        return False
    with RegularFile(path) as file:
        return not digest or sha256.sha256(file) == digest
