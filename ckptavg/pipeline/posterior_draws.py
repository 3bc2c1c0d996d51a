"""Draw models from a file of ``swag --posterior``, without the candidates.

Shape suffixes: K = kept deviations, C = consecutive elements of a tensor.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ckptavg.average.gaussian import Gaussian, Noise
from ckptavg.average.weighted_sum import weighted_average
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import NAMES, TORCH, dtype_names
from ckptavg.coefficients import EVERYTHING, Coefficients
from ckptavg.errors import InputError, counted
from ckptavg.filesystem.atomic import flush_folder
from ckptavg.filesystem.sha256 import sha256
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.options import Options
from ckptavg.options.posterior import PosteriorOptions
from ckptavg.output import hugging_face_folder, loader_files, provenance
from ckptavg.output.sharded_files import open_files
from ckptavg.pipeline.posterior_file import KEPT, SIGMA
from ckptavg.pipeline.preflight import check_output
from ckptavg.readers import FLOATING, Reader, StoredTensor, as_real, open_reader
from ckptavg.report.posterior import PosteriorResult
from ckptavg.report.result import Output
from ckptavg.runtime import version


def draw_from(
    path: Path, folders: Mapping[int, Options], options: Options, settings: PosteriorOptions
) -> PosteriorResult:
    """Write draws from the posterior in ``path``, each to its directory, completely or not at all.

    With the scale and the seed of the command that wrote it, they are the draws from the candidates but for the
    rounding of mean and deviations in the file.

    Raises:
        InputError: if the file is no posterior, or damaged.
    """
    with closing(open_reader(path)) as reader:
        stored = _opened(reader, settings, options.seed)
        digest, outputs = sha256(reader.files[0]), list[Output]()
        target = None if options.dtype is None else NAMES[options.dtype]
        specs = {n: replace(s, dtype=target) if target and s.dtype in FLOATING else s for n, s in stored.specs.items()}
        with hugging_face_folder.created_folder(options.destination[1]):
            for own in folders.values():
                check_output(own)
            for sample, own in folders.items():
                outputs.append(_write(stored, sample, own, specs, digest))
        folder = options.destination[1] or Path()
        return PosteriorResult(
            strategy=provenance.DRAWN, settings={"from": str(path)}, seed=options.seed, candidates=(), draws=outputs,
            gaussian=asdict(stored.gaussian), warnings=[f"wrote {counted(len(outputs), 'draw')} to {folder}"],
            output=replace(outputs[0], path=folder, sha256="", bytes=sum(output.bytes for output in outputs)),
        )  # fmt: skip


def _write(stored: "_Stored", sample: int, options: Options, specs: Mapping[str, StoredTensor], digest: str) -> Output:
    noise = Noise(gaussian=stored.gaussian, sample=sample, deviation=stored.deviation, names=stored.names)
    mean, folder = stored.terms[-1], options.destination[1]
    assert folder is not None
    record = {
        "schema": provenance.SCHEMA, "version": version.own(), "strategy": provenance.DRAWN,
        "settings": {**asdict(stored.gaussian), "sample": sample},
        "posterior": {"name": mean.name, "sha256": digest},
    }  # fmt: skip
    metadata = {"format": "pt", provenance.KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))}
    dtype = dtype_names(specs.values())
    with (
        hugging_face_folder.created_folder(folder, loader_files.folders(mean)),
        open_files(folder, mean, specs, metadata, options.max_shard_size, force=options.force) as out,
    ):
        for part in weighted_average(stored.terms, stored.coefficients(sample), specs, noise=noise):
            out.write(*part)
        with hugging_face_folder.copies(mean, folder, dtype, force=options.force):
            out.publish(metadata)
        flush_folder(out.path)
        return Output(path=out.path, sha256=out.sha256, bytes=out.size, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """An open file of a posterior.

    Attributes:
        terms: the K deviations and, as the last, the mean, each as if it was a checkpoint.
        gaussian, names, means: see `ckptavg.average.gaussian.Posterior`.
        specs: shapes, and dtypes of the candidates.
    """

    tensors: Mapping[str, StoredTensor]
    terms: Sequence[Checkpoint]
    gaussian: Gaussian
    names: Mapping[str, str]
    means: Sequence[str]
    specs: Mapping[str, StoredTensor]

    def deviation(self, name: str, start: int, count: int) -> NDArray[np.float32]:
        """Read σ [C]; see `ckptavg.average.noise.Deviation`."""
        spec = self.tensors[SIGMA.format(name)]
        values_C = torch.empty(count, dtype=TORCH[spec.dtype])
        self.terms[-1].reader.read_into(spec, start, values_C.view(torch.uint8).numpy().data)
        return values_C.float().numpy()

    def coefficients(self, sample: int) -> Coefficients:
        """Return the coefficients of a draw: √(c/(K − 1)) z_k, and 1 for the mean."""
        k = self.gaussian.deviations
        drawn = (*(self.gaussian.steps(sample) if k else ()), 1.0)
        if not self.means:
            return Coefficients((drawn,), linear=True)
        return Coefficients((drawn, (*[0.0] * k, 1.0)), (*EVERYTHING, tuple(self.means)), linear=True)


def _opened(reader: Reader, settings: PosteriorOptions, seed: int) -> _Stored:
    """Return the posterior in a file, with the scale and the seed of this command; InputError if it is none."""
    try:
        record: Any = strict_json(reader.metadata[provenance.KEY])
        entries = record["posterior"]
        gaussian, names, k = Gaussian(**entries["gaussian"]), dict(entries["names"]), entries["gaussian"]["deviations"]
        tensors = {name: as_real(spec) for name, spec in dict[str, Any](reader.tree).items()}
        parts = {pattern.format(name) for name in names for pattern in ((SIGMA, KEPT) if k else (SIGMA,))}
        mean = {name: spec for name, spec in tensors.items() if name not in parts}
        specs = {name: replace(mean[name], dtype=own, record="", offset=0) for name, own in entries["dtypes"].items()}
        fits = specs.keys() == mean.keys() and all(spec.dtype in TORCH for spec in specs.values())
        for name in names:
            spec, dtype = mean[name], mean[name].dtype
            expected = {SIGMA: spec.shape, **({KEPT: (k, *spec.shape)} if k else {})}
            stored = {pattern: tensors[pattern.format(name)] for pattern in expected}
            fits = fits and all((own.dtype, own.shape) == (dtype, expected[p]) for p, own in stored.items())
        if not fits:
            raise ValueError("the tensors are not those of its metadata")
        terms = [mean | {name: _slice(tensors[KEPT.format(name)], i) for name in names} for i in range(k)]
        kept = frozenset(record["not_averaged"])
        gaussian = replace(
            gaussian, seed=seed, scale=gaussian.scale if settings.scale is None else float(settings.scale)
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        hint = "ckptavg swag CKPTS --posterior FILE writes one"
        raise InputError("is no posterior of ckptavg, or a damaged one", path=reader.path, hint=hint) from error
    checkpoints = [
        Checkpoint(path=reader.path, name=reader.path.name, key="", tensors=own, reader=reader, kept=kept)
        for own in (*terms, mean)
    ]
    return _Stored(
        tensors=tensors, terms=checkpoints, gaussian=gaussian, names=names, means=entries["means"], specs=specs
    )


def _slice(stacked: StoredTensor, i: int) -> StoredTensor:
    """Return the i-th of stacked tensors."""
    part = replace(stacked, shape=stacked.shape[1:])
    return replace(part, offset=stacked.offset + i * part.nbytes)
