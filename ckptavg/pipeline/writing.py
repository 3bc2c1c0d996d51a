"""Write the output: average exactly, recompute BatchNorm, score the file as written, then rename it into place."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ckptavg.average import PlannedOutput, plan_output
from ckptavg.checkpoints import checksums
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.derived import SPECTRAL_NORM
from ckptavg.checkpoints.dtypes import dtype_names
from ckptavg.coefficients import Coefficients
from ckptavg.filesystem.atomic import flush_folder
from ckptavg.filesystem.digest import PLACEHOLDER, Algorithm, hash_while_reading
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.options import Options
from ckptavg.output import hugging_face_folder, loader_files, provenance
from ckptavg.output.dcp_folder import DcpFolder
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.output.sharded_files import ShardedFiles, open_files
from ckptavg.pipeline.exact_adapter import factor_note
from ckptavg.pipeline.session import Session
from ckptavg.readers import StoredTensor
from ckptavg.report.result import Output
from ckptavg.runtime.progress import Progress
from ckptavg.runtime.threads import count
from ckptavg.runtime.workers import Workers
from ckptavg.score import Score, Split
from ckptavg.strategies import name_of

if TYPE_CHECKING:
    from torch import Tensor

    from ckptavg.average.gaussian import Draw

_MEGABYTE: Final = 10**6
_File: TypeAlias = SafetensorsFile | ShardedFiles | DcpFolder


@dataclass(frozen=True, kw_only=True)
class WrittenOutput:
    """Written file, its scores (empty without a task), and the names of the files copied along."""

    output: Output
    scores: Mapping[Split, Score]
    copied: Sequence[str]
    notes: Sequence[str] = ()


def write_output(
    this: Session, coefficients: Coefficients, strategy: Strategy, *, draw: Draw | None = None
) -> WrittenOutput:
    """Write the average that ``strategy`` chose to the run's destination, completely or not at all.

    It is streamed into a temporary file next to the destination, which is renamed once it is complete and scored. In a
    directory the model's files are renamed last, so that a killed run leaves nothing that looks like a model.

    With ``draw`` the file is that draw instead of an average, and it is not scored.
    """
    checkpoints, evaluator, options, workers = this.checkpoints, this.evaluator, this.options, this.run.workers
    workers.check_equal("coefficients", coefficients, "does the task depend on the rank?")
    plan = plan_output(
        checkpoints, coefficients, dtype=options.dtype, mode=options.adapter, rank=options.rank, workers=workers,
        noise=draw and draw.noise,
    )  # fmt: skip
    specs, selected = plan.specs, [checkpoints[i] for i in coefficients.selected]
    path, folder = options.destination
    recomputed = sorted(set(evaluator.statistics) & specs.keys()) if evaluator else []
    dtype = dtype_names(specs.values())
    name, settings = (provenance.DRAWN, draw.settings) if draw else (name_of(strategy), asdict(strategy))  # pyright: ignore[reportArgumentType]
    describe = partial(
        provenance.metadata, checkpoints, coefficients, strategy=name, settings=settings, dtype=options.dtype,
        adapter=options.adapter, rank=options.rank, not_averaged=plan.not_averaged, keep=options.keep,
        average=options.average, recomputed=recomputed,
        **({"derived": plan.derived} if plan.derived else {}),
        **({"runs": [c.run for c in selected]} if isinstance(strategy, PlainAverage) and strategy.by_run else {}),
    )  # fmt: skip
    files = _hashed(selected, options)
    placeholder = PLACEHOLDER if options.algorithm else ""
    scores: Mapping[Split, Score] = {}
    with (
        hugging_face_folder.created_folder(
            folder if workers.is_rank_zero else None, loader_files.folders(selected[-1])
        ),
        _open_output(path, specs, describe(lambda _: placeholder), options, selected[-1]) as out,
        hash_while_reading(files, count()) as digest,
    ):
        _stream(plan, out, this.run.progress)
        out.barrier()
        if evaluator:
            exact_adapter = plan.config if len(selected) > 1 else None
            if exact_adapter is None and (recomputed or draw is None):
                state = evaluator.load_output(specs, out.read_into)
                _write_recomputed({name: state[name] for name in recomputed}, specs, out, workers)
            if draw is None:
                scores = evaluator.score_output(coefficients, specs, out.read_into, exact_adapter)
        computed = ChainMap(*workers.gather({file.path: digest(file) for file in files}))
        read = [file for checkpoint in selected for file in checkpoint.reader.files] if computed else []
        digests = {file.path: checksums.agreed(file, computed[file.path]) for file in read}
        metadata = describe(lambda file: digests[file.path] if digests else "")
        for checkpoint in checkpoints if evaluator else selected:
            checkpoint.check_unchanged()
        if isinstance(out, DcpFolder):
            out.save(metadata)

        def publish() -> tuple[list[str], dict[str, Any]]:
            if folder:
                hugging_face_folder.check_tied(selected[-1], specs, out.read_into)
            with hugging_face_folder.copies(selected[-1], folder, dtype, plan.config, force=options.force) as copied:
                out.publish(metadata)
                this.record_output(out.published)
            flush_folder(out.path)
            return copied, {"data_digest": out.data_digest, "sha256": out.sha256, "bytes": out.size}

        copied, figures = workers.broadcast(workers.on_rank_zero(publish)) or ([], {"bytes": 0})
    output = Output(
        path=out.path, **figures, dtype=dtype, source_digests={str(path): text for path, text in digests.items()},
        not_averaged=plan.not_averaged, recomputed=recomputed,
        derived=plan.derived.get(SPECTRAL_NORM, ()),
        averaged_buffers=sorted(evaluator.averaged_buffers) if evaluator and len(selected) > 1 else (),
    )  # fmt: skip
    notes = [*plan.notes, *factor_note(this, plan, coefficients, strategy), *_not_finite(plan, workers)]
    return WrittenOutput(output=output, scores=scores, copied=copied, notes=notes)


def _not_finite(plan: PlannedOutput, workers: Workers) -> list[str]:
    """Name the tensors that were copied although they are not finite."""
    names = sorted(set[str]().union(*workers.gather(plan.copied)))
    kept = [name for name in names if name in plan.not_averaged]
    shared = [name for name in names if name not in plan.not_averaged]
    reasons = (("equal in all candidates", shared), ("taken from the last selected candidate", kept))
    return [f"copied as it is, {reason} and not finite: {', '.join(same)}" for reason, same in reasons if same]


def _hashed(selected: Sequence[Checkpoint], options: Options) -> dict[RegularFile, Algorithm]:
    """Return the files of which this rank computes digests, with their algorithms."""
    files, workers = [file for checkpoint in selected for file in checkpoint.reader.files], options.workers
    own = files[workers.rank :: workers.world_size] if options.algorithm else ()
    return {file: checksums.algorithm(file, options.algorithm or "blake3") for file in own}


def _write_recomputed(
    state: Mapping[str, Tensor], specs: Mapping[str, StoredTensor], out: _File, workers: Workers
) -> None:
    if not state:
        return
    from ckptavg.checkpoints.torch_dtypes import TORCH
    from ckptavg.journal.tensor_json import raw

    for name in state if workers.is_rank_zero else ():
        out.write(name, 0, memoryview(raw(state[name].to(TORCH[specs[name].dtype]))))
    out.barrier()


def _stream(plan: PlannedOutput, out: _File, progress: Progress) -> None:
    done, total = 0, sum(spec.nbytes for spec in plan.specs.values())
    for name, offset, data in plan.parts:
        out.write(name, offset, data)
        done += len(data)
        progress("averaging, MB", -(-done // _MEGABYTE), -(-total // _MEGABYTE))


def _open_output(
    path: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], options: Options, like: Checkpoint
) -> _File:
    """Open the output: a DCP directory, several files as its loader expects them, or one file."""
    more: dict[str, Any] = {"force": options.force, "workers": options.workers, "digests": options.algorithm}
    if options.format == "dcp":
        key = like.key if like.reader.format == "dcp" else ""  # loads under the same key as the candidates
        return DcpFolder(path, specs, metadata, key=key, **more)
    if folder := options.destination[1]:
        return open_files(folder, like, specs, metadata, options.max_shard_size, **more)
    return SafetensorsFile(path, specs, metadata, **more)
