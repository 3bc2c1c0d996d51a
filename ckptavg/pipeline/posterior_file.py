"""Write SWAG's Gaussian to one safetensors file.

The file has the mean of each tensor under its name, and of the tensors that are drawn the standard deviation under
``NAME::sd`` and the K kept deviations under ``NAME::dev``, [K, …]: all in float32, or float64 if the candidates are.

Shape suffixes: K = kept deviations.
"""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import torch

from ckptavg.average.gaussian import Posterior
from ckptavg.average.weighted_sum import CHUNK, Part, not_averaged, output_specs, weighted_average
from ckptavg.checkpoints import checksums
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import dtype_names
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.coefficients import Coefficients
from ckptavg.errors import OutputExistsError, UsageError
from ckptavg.filesystem.digest import digest
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.options import Options
from ckptavg.output import loader_files, provenance
from ckptavg.output.destination import preflight
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.pipeline.session import Session
from ckptavg.readers import StoredTensor
from ckptavg.report.result import Output

SIGMA: Final = "{}::sd"
KEPT: Final = "{}::dev"


def check(path: Path | str | None, options: Options, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse a file of ``--posterior`` that cannot be written or drawn from, or would replace candidates or output."""
    if path is None:
        return
    if checkpoints[0].derived and (vectors := checkpoints[0].derived.vectors):
        message = f"--posterior has no vectors of spectral norm, such as {vectors[0]}, which each draw recomputes"
        raise UsageError(message, hint="--samples N writes draws themselves")
    target, files = Path(path).resolve(), [file for checkpoint in checkpoints for file in checkpoint.reader.files]
    taken = {options.destination[0].resolve(): "is -o", **{f.path.resolve(): "is one of the candidates" for f in files}}
    if target in taken:
        raise OutputExistsError(taken[target], path=path, hint="choose another --posterior")
    preflight(Path(path), options.force)


@contextmanager
def written(this: Session, posterior: Posterior, path: Path | str | None) -> Generator[Output | None]:
    """Write a posterior to ``path``, unless that is None; a file that is new is removed again if the body fails."""
    with ExitStack() as undo:
        if path is not None and this.run.workers.is_rank_zero and not os.path.lexists(path):
            undo.callback(Path(path).unlink, missing_ok=True)
        yield None if path is None else _write(this, posterior, path)
        undo.pop_all()


def _write(this: Session, posterior: Posterior, path: Path | str) -> Output | None:
    checkpoints, workers = posterior.checkpoints, this.run.workers
    n, k = len(checkpoints), posterior.gaussian.deviations
    own = output_specs(checkpoints)
    wide = any(spec.dtype == "F64" for spec in own.values())
    means = output_specs(checkpoints, "float64" if wide else "float32")
    specs = dict(means)
    for name in posterior.names:
        specs[SIGMA.format(name)] = means[name]
        if k:
            specs[KEPT.format(name)] = replace(means[name], shape=(k, *means[name].shape))
    record = {
        "gaussian": asdict(posterior.gaussian), "candidates": n, "names": posterior.names,
        "dtypes": {name: spec.dtype for name, spec in own.items()},
        "file": Path(loader_files.file_name(checkpoints[-1])).name,
    }  # fmt: skip

    algorithm = this.options.algorithm

    def source_digest(file: RegularFile) -> str:
        return checksums.agreed(file, digest(file, checksums.algorithm(file, algorithm))) if algorithm else ""

    def write() -> Output:
        metadata = provenance.metadata(
            checkpoints, Coefficients.uniform(range(n), n), source_digest,
            strategy=provenance.DRAWN, posterior=record, not_averaged=not_averaged(checkpoints[0]),
        )  # fmt: skip
        with SafetensorsFile(Path(path), specs, metadata, force=this.options.force, digests=algorithm) as out:
            for name, offset, data in _parts(posterior, means):
                out.write(name, offset, data)
            for checkpoint in checkpoints:
                checkpoint.check_unchanged()
            out.commit()
            return Output(
                path=out.path, data_digest=out.data_digest, sha256=out.sha256, bytes=out.size,
                dtype=dtype_names(specs.values()),
            )  # fmt: skip

    return workers.broadcast(workers.on_rank_zero(write))


def _parts(posterior: Posterior, means: Mapping[str, StoredTensor]) -> Iterator[Part]:
    checkpoints, n = posterior.checkpoints, len(posterior.checkpoints)
    yield from weighted_average(checkpoints, Coefficients.uniform(range(n), n), means)
    for name in posterior.names:
        dtype, numel = TORCH[means[name].dtype], means[name].numel
        for start in range(0, numel, CHUNK):
            values = torch.from_numpy(posterior.deviation(name, start, min(CHUNK, numel - start))).to(dtype)
            yield Part(SIGMA.format(name), start * dtype.itemsize, values.view(torch.uint8).numpy().data)
    whole = {name: range(means[name].numel) for name in posterior.names}
    for k, row in enumerate(posterior.gaussian.rows(n)):
        if any(row):
            deviation = Coefficients((tuple(row),), linear=True)
            parts = weighted_average(checkpoints, deviation, means, only=whole)
        else:  # the first of all candidates is their mean so far
            parts = (Part(name, 0, memoryview(bytes(means[name].nbytes))) for name in whole)
        for name, offset, data in parts:
            yield Part(KEPT.format(name), k * means[name].nbytes + offset, data)
