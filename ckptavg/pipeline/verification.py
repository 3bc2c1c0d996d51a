"""Verification: rebuild an output and its metadata from the sources that it names, and compare."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ckptavg.average import PlannedOutput, plan_output
from ckptavg.checkpoints import duplicates
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.kept import keeping
from ckptavg.checkpoints.numbers import is_finite, widened
from ckptavg.checkpoints.state_dict import check_agreement, model_tensors
from ckptavg.errors import CkptavgError, InputError, UsageError, counted, printable
from ckptavg.filesystem.digest import NAMES, algorithm_of, digest
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.output import data_digest as data_digests
from ckptavg.output import provenance
from ckptavg.pipeline import recorded_provenance
from ckptavg.pipeline.data_check import check_data
from ckptavg.pipeline.recorded_provenance import NotAnAverageError, RecordedProvenance
from ckptavg.pipeline.recorded_sources import locate, places, with_steps
from ckptavg.readers import FLOATING, Reader, StoredTensor, open_reader
from ckptavg.report.display import Report


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Report):
    """Names of tensors by outcome: ``agree`` have the bytes of the average of the sources, ``differ`` do not.

    ``data_digest`` is the digest of the data in the file's own metadata, empty if there is none, and ``damaged`` names
    the files whose data have another one. ``not_compared`` is the reason why there was no comparison with the sources.
    ``unchecked`` were recomputed from the task's data (BatchNorm statistics) and cannot be rebuilt from the sources.
    ``without_digest`` are the sources that were recognised by name, step and content alone; ``own_strategy`` is the
    recorded strategy if it is none of ckptavg's, whose settings were not checked.
    """

    kind: ClassVar[str] = "verification"

    path: Path
    data_digest: str = ""
    damaged: Sequence[str] = ()
    not_compared: str | None = None
    agree: Sequence[str] = ()
    differ: Sequence[str] = ()
    unchecked: Sequence[str] = ()
    without_digest: Sequence[str] = ()
    own_strategy: str | None = None

    def __str__(self) -> str:
        lines: list[str] = []
        if self.damaged:
            lines.append(f"{self.damaged[0]}: the data are damaged: their digest is not the recorded one")
        elif self.data_digest:
            lines.append(f"the data are as they were written, by their {NAMES[self.data_digest[:6]]} digest")
        if self.not_compared:
            return "\n".join(map(printable, [*lines, f"not compared with its sources: {self.not_compared}"]))
        unchecked = len(self.unchecked)
        recomputed = f"; {unchecked} were recomputed from data and cannot be checked" if unchecked else ""
        agree = counted(len(self.agree), "tensor")
        lines.append(f"{agree} equal to the average of the sources, byte for byte{recomputed}")
        if self.differ:
            differ = counted(len(self.differ), "tensor")
            lines.insert(0, f"{differ} not equal to the average of the sources, such as {self.differ[0]}")
        if absent := len(self.without_digest):
            lines.append(f"no digest of {counted(absent, 'source')}: recognised by name, step and content alone")
        if self.own_strategy is not None:
            lines.append(f"{self.own_strategy} is no strategy of ckptavg, so its settings were not checked")
        return "\n".join(map(printable, lines))


def verify(file: Path, sources: Path | None = None) -> Verification:
    """Compute the digest of the data of ``file``, and compare it with the one in its metadata; recompute the average
    that these describe, and the metadata, from the files under ``sources``.

    Args:
        file: an output; for a sharded output its index.
        sources: directory of the source checkpoints. None is the working directory, and if the first source is not
            there, or the file is no average but a posterior, only its data are checked.
    Raises:
        InputError: if ``file`` is not an output of ckptavg, a source is missing or has another digest, the metadata
            are not those of the average of the sources, or no tensor could be compared.
    """
    with ExitStack() as stack:
        output = stack.enter_context(closing(open_reader(file)))
        data = check_data(output)
        try:
            record = recorded_provenance.read(output)
        except NotAnAverageError as error:
            if sources is not None or not data.digest:
                raise
            return Verification(path=file, data_digest=data.digest, damaged=data.damaged, not_compared=error.reason)
        first = Path(record.sources[0].name)
        if sources is None and data.digest and not any(places(first, Path())):
            reason = f"{first} is not under the working directory (--sources DIR)"
            return Verification(path=file, data_digest=data.digest, damaged=data.damaged, not_compared=reason)
        recomputed = record.entries["recomputed"]
        checkpoints: list[Checkpoint] = []
        for source in record.sources:
            checkpoints.append(locate(source, sources or Path(), file))
            stack.callback(checkpoints[-1].reader.close)
        try:
            checkpoints = with_steps(record.sources, checkpoints)
            plan = _plan(record, checkpoints, file)
            check_recomputed(recomputed, checkpoints[0].tensors, file)
            _check_metadata(record, output, checkpoints, plan, data.digest)
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
        path=file, data_digest=data.digest, damaged=data.damaged, agree=sorted(agree),
        differ=sorted(differ - set(recomputed)), unchecked=sorted(recomputed),
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
    record: RecordedProvenance, output: Reader, checkpoints: Sequence[Checkpoint], plan: PlannedOutput, data_digest: str
) -> None:
    """Raise InputError naming the first entry that is not as the sources give it.

    ``recomputed`` is in order, and has been checked; settings and the version that wrote the file have no other source.
    """
    entries = {**record.entries, "recomputed": sorted(record.entries["recomputed"]), "not_averaged": plan.not_averaged}
    entries |= {"derived": plan.derived} if "derived" in entries else {}
    pairs = [(c.reader.named_files, s.digests) for c, s in zip(checkpoints, record.sources, strict=True)]
    recorded = {file: digests[name] for files, digests in pairs for name, file in files.items()}
    if any(recorded.values()) and not data_digest and record.schema > 1:
        raise InputError(f"its metadata have digests of the sources, but no {data_digests.KEY}", path=output.path)

    def rebuilt_digest(file: RegularFile) -> str:
        return digest(file, algorithm_of(recorded[file]) or "blake3") if any(recorded.values()) else ""

    rebuilt = provenance.metadata(checkpoints, record.coefficients, rebuilt_digest)
    names = ("groups", "schema", "sources")
    entries |= {name: value for name, value in strict_json(rebuilt.pop(provenance.KEY)).items() if name in names}
    own = (provenance.KEY, data_digests.KEY)  # the latter was compared with the data
    others: dict[str, Any] = {name: value for name, value in output.metadata.items() if name not in own}
    wrong = recorded_provenance.difference(dict(record.entries), entries)
    if wrong := wrong or recorded_provenance.difference(others, rebuilt, "other metadata"):
        raise InputError(f"its metadata differ from its sources: {wrong}", path=output.path)
