"""Write the output: average exactly, recompute BatchNorm, score the file as written, then rename it into place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from ckptavg.average import PlannedOutput, plan_output
from ckptavg.checkpoints import checksums
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import TORCH, dtype_names
from ckptavg.coefficients import Coefficients
from ckptavg.filesystem import sha256 as digests
from ckptavg.filesystem.atomic import flush_folder
from ckptavg.objective import Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.options import Options
from ckptavg.output import hugging_face_folder, provenance
from ckptavg.output.dcp_folder import DcpFolder
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.output.sharded_files import ShardedFiles, split_names
from ckptavg.readers import StoredTensor
from ckptavg.report.result import Output
from ckptavg.runtime.progress import Watch
from ckptavg.runtime.threads import processors
from ckptavg.score import Score, Split
from ckptavg.strategies import name_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MEGABYTE: Final = 10**6


@dataclass(frozen=True, kw_only=True)
class WrittenOutput:
    """Written file, its scores (empty if its shapes do not fit the model), and the names of the files copied along."""

    output: Output
    scores: Mapping[Split, Score]
    copied: Sequence[str]
    notes: Sequence[str] = ()


def write_output(
    checkpoints: Sequence[Checkpoint],
    coefficients: Coefficients,
    strategy: Strategy,
    options: Options,
    evaluator: Evaluator | None,
    watch: Watch | None,
) -> WrittenOutput:
    """Write the average of ``checkpoints`` to the destination in ``options``, completely or not at all.

    Args:
        checkpoints: all candidates, open.
        coefficients: coefficients of the candidates.
        strategy: strategy that found them, for the metadata.
        options: options of the run.
        evaluator: scores the file; None without a task.
        watch: progress callback.
    """
    path, folder = options.destination
    workers = options.workers
    workers.check_equal("coefficients", coefficients, "does the task depend on the rank?")
    source = checkpoints[coefficients.selected[-1]]
    plan = plan_output(
        checkpoints, coefficients, dtype=options.dtype, mode=options.adapter, rank=options.rank, workers=workers
    )
    with hugging_face_folder.created_folder(folder if workers.is_rank_zero else None):
        if folder:
            path = folder / hugging_face_folder.file_name(source)
        return _write(path, plan, checkpoints, coefficients, strategy, options, evaluator, watch)


def _write(
    path: Path,
    plan: PlannedOutput,
    checkpoints: Sequence[Checkpoint],
    coefficients: Coefficients,
    strategy: Strategy,
    options: Options,
    evaluator: Evaluator | None,
    watch: Watch | None,
) -> WrittenOutput:
    """Stream the average into a temporary file next to its destination, and rename it once it is complete and scored.

    In a directory the model's files are renamed last, so that a killed run leaves nothing that looks like a model.
    """
    specs, kept = plan.specs, plan.not_averaged
    fits = {name: spec.shape for name, spec in specs.items()} == {n: t.shape for n, t in checkpoints[0].tensors.items()}
    has_evaluator = evaluator is not None
    if not fits:
        evaluator = None  # the output is an adapter with another rank than the model's
    recomputed = sorted(set(evaluator.statistics) & specs.keys()) if evaluator else []
    describe = partial(
        provenance.metadata, checkpoints, coefficients, name_of(strategy), asdict(strategy),  # pyright: ignore[reportArgumentType]
        dtype=options.dtype, adapter=options.adapter, rank=options.rank, not_averaged=kept, recomputed=recomputed,
    )  # fmt: skip
    scores: dict[Split, Score] = {}
    workers = options.workers
    files = [file for i in coefficients.selected for file in checkpoints[i].reader.files][
        workers.rank :: workers.world_size
    ]
    hashing = (
        digests.hash_while_reading(files, min(torch.get_num_threads(), processors()))
        if options.digests
        else nullcontext(digests.no_digest)
    )
    metadata = describe(digest=digests.placeholder_digest if options.digests else digests.no_digest)
    with _open_output(path, specs, metadata, options, checkpoints[0]) as out, hashing as digest:
        done, total = 0, sum(spec.nbytes for spec in specs.values())
        for name, offset, data in plan.parts:
            out.write(name, offset, data)
            done += len(data)
            if watch:
                watch("averaging, MB", done // MEGABYTE, -(-total // MEGABYTE), {})
        out.barrier()
        if evaluator:
            state = evaluator.load_output(coefficients, specs, out.read_into)
            for name in recomputed if workers.is_rank_zero else ():
                out.write(name, 0, _bytes(state[name], TORCH[specs[name].dtype]))
            scores = {split: evaluator.score_output(coefficients, split) for split in evaluator.splits}
        sha256_of = {
            path: value
            for part in workers.gather({file.path: digest(file) for file in files})
            for path, value in part.items()
        }
        metadata |= describe(digest=lambda file: checksums.agreed(file, sha256_of[file.path]))
        for i in range(len(checkpoints)) if has_evaluator else coefficients.selected:
            checkpoints[i].check_unchanged()
        source, dtype = checkpoints[coefficients.selected[-1]], dtype_names(spec.dtype for spec in specs.values())
        folder = options.destination[1]
        if isinstance(out, DcpFolder):
            out.save()

        def publish() -> tuple[list[str], str, int]:
            if folder:
                hugging_face_folder.check_tied(source, specs, out.read_into)
            with hugging_face_folder.copies(source, folder, dtype, plan.config) as copied:
                out.publish()
            flush_folder(out.path)
            return copied, out.sha256, out.size

        copied, sha256, size = workers.broadcast(workers.on_rank_zero(publish)) or ([], "", 0)
    output = Output(path=out.path, sha256=sha256, bytes=size, dtype=dtype, not_averaged=kept, recomputed=recomputed)
    return WrittenOutput(output=output, scores=scores, copied=copied, notes=plan.notes)


def _open_output(
    path: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], options: Options,
    like: Checkpoint,
) -> SafetensorsFile | ShardedFiles | DcpFolder:  # fmt: skip
    """Open the output: a DCP directory, several shards if it exceeds ``--max-shard-size``, or one file."""
    if options.format == "dcp":
        key = like.key if like.format == "dcp" else ""  # loads under the same key as the candidates
        return DcpFolder(path, specs, metadata, key=key, force=options.force, workers=options.workers)
    if options.max_shard_size is not None and len(split_names(specs, options.max_shard_size).filename_to_tensors) > 1:
        return ShardedFiles(
            path.parent, specs, metadata, options.max_shard_size, force=options.force, workers=options.workers
        )
    return SafetensorsFile(path, specs, metadata, force=options.force, workers=options.workers)


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    data = bytearray(tensor.numel() * dtype.itemsize)
    torch.frombuffer(data, dtype=dtype).copy_(tensor.flatten())
    return memoryview(data)
