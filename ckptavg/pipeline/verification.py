"""Verification: rebuild an output and its metadata from the sources that it names, and compare."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ckptavg.average import PlannedOutput, plan_output
from ckptavg.checkpoints import duplicates
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import open_checkpoint
from ckptavg.checkpoints.kept import keeping
from ckptavg.checkpoints.listing import CheckpointPath
from ckptavg.checkpoints.numbers import is_finite, widened
from ckptavg.checkpoints.state_dict import check_agreement, model_tensors
from ckptavg.errors import CkptavgError, InputError, UsageError, counted, printable
from ckptavg.filesystem import sha256
from ckptavg.filesystem.regular_file import RegularFile, is_folder
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.output import provenance
from ckptavg.pipeline import recorded_provenance
from ckptavg.pipeline.recorded_provenance import RecordedProvenance, Source
from ckptavg.readers import FLOATING, Reader, StoredTensor, open_reader
from ckptavg.report.display import Report


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Report):
    """Names of tensors by outcome: ``agree`` have the expected bytes, ``differ`` do not.

    ``unchecked`` were recomputed from the task's data (BatchNorm statistics) and cannot be rebuilt from the sources.
    ``without_digest`` are the sources that were recognised by name, step and content alone; ``own_strategy`` is the
    recorded strategy if it is none of ckptavg's, whose settings were not checked.
    """

    path: Path
    agree: Sequence[str]
    differ: Sequence[str]
    unchecked: Sequence[str]
    without_digest: Sequence[str] = ()
    own_strategy: str | None = None

    def __str__(self) -> str:
        unchecked = len(self.unchecked)
        recomputed = f"; {unchecked} were recomputed from data and cannot be checked" if unchecked else ""
        agree = counted(len(self.agree), "tensor")
        lines = [f"{agree} equal to the average of the sources, byte for byte{recomputed}"]
        if self.differ:
            differ = counted(len(self.differ), "tensor")
            lines.insert(0, f"{differ} not equal to the average of the sources, such as {self.differ[0]}")
        if absent := len(self.without_digest):
            lines.append(f"no digest of {counted(absent, 'source')}: recognised by name, step and content alone")
        if self.own_strategy is not None:
            lines.append(f"{self.own_strategy} is no strategy of ckptavg, so its settings were not checked")
        return "\n".join(map(printable, lines))


def verify(file: Path, sources: Path) -> Verification:
    """Recompute the average recorded in the metadata of ``file``, and that metadata, from the files under ``sources``.

    Args:
        file: an output; for a sharded output its index.
        sources: directory of the source checkpoints.
    Raises:
        InputError: if ``file`` is not an output of ckptavg, a source is missing or has another SHA-256, the metadata
            are not those of the average of the sources, or no tensor could be compared.
    """
    with ExitStack() as stack:
        output = stack.enter_context(closing(open_reader(file)))
        record = recorded_provenance.read(output)
        recomputed = record.entries["recomputed"]
        checkpoints: list[Checkpoint] = []
        for source in record.sources:
            checkpoints.append(_locate(source, sources, file))
            stack.callback(checkpoints[-1].reader.close)
        try:
            checkpoints = _with_steps(record.sources, checkpoints)
            plan = _plan(record, checkpoints, file)
            check_recomputed(recomputed, checkpoints[0].tensors, file)
            _check_metadata(record, output, checkpoints, plan)
            _, stored, _ = model_tensors(output, None)
            expected, actual = ({name: t.in_file for name, t in ts.items()} for ts in (plan.specs, stored))
            if actual != expected:
                raise InputError("its tensors differ from its sources in name, dtype or shape", path=file)
            compared, differ = _compare(plan, stored, output)
        except CkptavgError as error:
            error.hint = None  # of an average: an option such as --exclude
            raise
        _check_values([name for name in recomputed if name in differ], stored, output)
    if not compared - set(recomputed):
        raise InputError("no tensor could be compared with its sources", path=file)
    agree = plan.specs.keys() - differ - set(recomputed)
    return Verification(
        path=file, agree=sorted(agree), differ=sorted(differ - set(recomputed)), unchecked=sorted(recomputed),
        without_digest=record.without_digest, own_strategy=record.own_strategy,
    )  # fmt: skip


def _plan(record: RecordedProvenance, checkpoints: Sequence[Checkpoint], file: Path) -> PlannedOutput:
    check_agreement(checkpoints, mixed=record.entries["dtype"] is not None)
    copies, bad = duplicates.find(checkpoints)
    for error in bad.values():
        raise error
    for i, (original, relation) in copies.items():
        raise InputError(f"{relation} {checkpoints[original].path}: one source twice", path=checkpoints[i].path)
    entries = record.entries
    try:
        for name in (name for name, spec in checkpoints[0].tensors.items() if spec.dtype in FLOATING):
            record.coefficients.row(name)
        checkpoints = keeping(
            checkpoints, entries.get("keep", ()), entries.get("average", ()), derived="derived" in entries
        )
        return plan_output(
            checkpoints, record.coefficients, dtype=entries["dtype"], mode=entries["adapter"], rank=entries["rank"],
            noise=record.draw and record.draw.noise(checkpoints),
        )  # fmt: skip
    except (ValueError, UsageError) as error:
        raise InputError(f"its ckptavg metadata is damaged: {error}", path=file) from error


def _compare(plan: PlannedOutput, stored: Mapping[str, StoredTensor], output: Reader) -> tuple[set[str], set[str]]:
    """Return the names of the tensors that have bytes to compare, and of those that differ."""
    compared, differ = set[str](), set[str]()
    for name, offset, data in plan.parts:
        tensor, written = stored[name], memoryview(bytearray(len(data)))
        output.read_into(tensor, offset * tensor.numel // max(1, tensor.nbytes), written)
        compared.add(name)
        if written != data:
            differ.add(name)
    return compared, differ


def check_recomputed(names: Collection[str], tensors: Mapping[str, StoredTensor], file: Path) -> None:
    """Check that ``names``, which the metadata of ``file`` calls recomputed, are BatchNorm statistics by the layout.

    Running mean and variance are two floating-point vectors of one length, which is also that of the layer's weight and
    bias if it has them, beside the number of batches; only both together are recomputed.

    Raises:
        InputError: naming the first tensor that is something else, and may only be the average of the sources.
    """
    for name in names:
        layer = name.rpartition(".")[0]
        mean, variance, batches, weight, bias = (
            f"{layer}.{part}".removeprefix(".")
            for part in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
        )
        vectors = [tensors[part] for part in (mean, variance, weight, bias) if part in tensors]
        reason = None
        if name not in (mean, variance):
            reason = "is no running mean or variance of BatchNorm"
        elif lacking := [part for part in (mean, variance, batches) if part not in tensors]:
            reason = f"is no BatchNorm statistic: the sources have no {lacking[0]}"
        elif not {mean, variance} <= set(names):
            reason = "is only one of the two BatchNorm statistics of its layer"
        elif len({vector.shape for vector in vectors}) > 1 or len(vectors[0].shape) != 1 or tensors[batches].shape:
            reason = "is no BatchNorm statistic by the shapes of its layer's tensors"
        elif not all(vector.dtype in FLOATING for vector in vectors) or tensors[batches].dtype in FLOATING:
            reason = "is no BatchNorm statistic by the dtypes of its layer's tensors"
        if reason:
            raise InputError(f"the metadata calls it recomputed, but it {reason}", path=file, tensor=name)


def _check_values(names: Collection[str], stored: Mapping[str, StoredTensor], output: Reader) -> None:
    """Check statistics that are not averages: finite, and no variance is negative."""
    for name in names:
        data = bytearray(stored[name].nbytes)
        output.read_into(stored[name], 0, memoryview(data))
        if not is_finite(data, stored[name].dtype):
            raise InputError("a recomputed BatchNorm statistic is NaN or infinite", path=output.path, tensor=name)
        if name.endswith("running_var") and widened(data, stored[name].dtype).min() < 0:
            raise InputError("a recomputed variance of BatchNorm is negative", path=output.path, tensor=name)


def _check_metadata(
    record: RecordedProvenance, output: Reader, checkpoints: Sequence[Checkpoint], plan: PlannedOutput
) -> None:
    """Raise InputError naming the first entry that is not as the sources give it.

    ``recomputed`` is in order, and has been checked; settings and the version that wrote the file have no other source.
    """
    entries = {**record.entries, "recomputed": sorted(record.entries["recomputed"]), "not_averaged": plan.not_averaged}
    entries |= {"derived": plan.derived} if "derived" in entries else {}
    digest: Callable[[RegularFile], str] = sha256.sha256
    if not any(value for source in record.sources for value in source.sha256.values()):
        digest = lambda _: ""  # noqa: E731
    rebuilt = provenance.metadata(checkpoints, record.coefficients, digest)
    names = ("groups", "schema", "sources")
    entries |= {name: value for name, value in strict_json(rebuilt.pop(provenance.KEY)).items() if name in names}
    others: dict[str, Any] = {name: value for name, value in output.metadata.items() if name != provenance.KEY}
    wrong = recorded_provenance.difference(dict(record.entries), entries)
    if wrong := wrong or recorded_provenance.difference(others, rebuilt, "other metadata"):
        raise InputError(f"its metadata differ from its sources: {wrong}", path=output.path)


def _with_steps(sources: Sequence[Source], checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints with their recorded steps.

    Raises:
        InputError: if they have no kind of step in common that gives these, or they are out of training order.
    """
    steps = [source.step for source in sources]
    pairs = list(zip(checkpoints, steps, strict=True))
    kinds = [kind for kind in checkpoints[0].steps if all(c.steps.get(kind) == step for c, step in pairs)]
    in_order_given = not kinds and not set.intersection(*(set(checkpoint.steps) for checkpoint in checkpoints))
    by_pattern = all(step in checkpoint.steps.values() for checkpoint, step in pairs)
    if not kinds and not in_order_given and not by_pattern:
        odd, step = next(((c, step) for c, step in pairs if step not in c.steps.values()), pairs[0])
        actual = " or ".join(map(str, sorted(set(odd.steps.values())))) or "unknown"
        raise InputError(f"its step is {actual}, but the metadata has {step}", path=odd.path)
    for (_, before), (checkpoint, step) in pairwise(pairs):
        if step < before or (in_order_given and step == before):
            raise InputError(f"step {step} comes after {before}, out of training order", path=checkpoint.path)
    if in_order_given and steps[0] < 1:
        raise InputError(f"has no step, so it cannot be step {steps[0]}", path=checkpoints[0].path)
    return [replace(checkpoint, step=step) for checkpoint, step in pairs]


def _locate(source: Source, folder: Path, output: Path) -> Checkpoint:
    """Open the checkpoint under ``folder`` that has the name, the files and the digests of ``source``."""
    if not is_folder(folder):
        raise InputError("no such directory", path=folder)
    opened: list[Checkpoint] = []
    failures: list[CkptavgError] = []
    for place in sorted(_places(Path(source.name), folder), key=lambda place: place.weights):
        try:
            opened.append(_open(place, source))
        except CkptavgError as error:
            failures.append(error)
        if opened and (all(source.sha256.values()) or len(opened) > 1):
            break
    if len(opened) == 1:
        return opened[0]
    for checkpoint in opened:
        checkpoint.reader.close()
    if opened:
        what = f"without digests it cannot be told from {opened[1].path}, which has the name of the same source"
        raise InputError(what, path=opened[0].path, hint="pass a directory that holds only one of them with --sources")
    if failures:
        raise failures[0]
    hint = "pass the directory of the sources with --sources"
    raise InputError(f"no source {source.name} under {folder}", path=output, hint=hint)


def _places(name: Path, folder: Path) -> Iterator[CheckpointPath]:
    """Yield the paths under ``folder`` that end in ``name``, which may begin with the last parts of ``folder``."""
    own = folder.resolve().parts
    roots = [folder.joinpath(*name.parts[i:]) for i in range(1, len(name.parts)) if own[-i:] == name.parts[:i]]
    roots += [Path(parent) / name for parent, *_ in os.walk(folder)]
    for weights in filter(os.path.lexists, roots):
        depth = len(name.parts) - 1
        path = weights.parent if depth and not is_folder(weights) else weights
        yield CheckpointPath(
            path=path, weights=weights, name=str(name), order=0, explicit=True,
            folder=weights.parents[depth - 1] if depth else None,
        )  # fmt: skip


def _open(place: CheckpointPath, source: Source) -> Checkpoint:
    checkpoint = open_checkpoint(place, source.key, allow_nonfinite=True)
    try:
        files = checkpoint.reader.named_files
        if odd := sorted(files.keys() ^ source.sha256.keys()):
            what = "is not a file of the checkpoint" if odd[0] in source.sha256 else "has no digest in the metadata"
            raise InputError(f"its file {odd[0]} {what}", path=place.path)
        for name, file in files.items():
            if source.sha256[name] and sha256.sha256(file) != source.sha256[name]:
                what = "is not the file the average was made from: its SHA-256 differs"
                raise InputError(what, path=file.path)
    except BaseException:
        checkpoint.reader.close()
        raise
    return checkpoint
