"""Draw models from a file of ``swag --posterior``, without the candidates.

Shape suffixes: K = kept deviations, C = consecutive elements of a tensor.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ckptavg.average.gaussian import Gaussian, Noise
from ckptavg.average.lora_config import CONFIG_NAME
from ckptavg.average.weighted_sum import weighted_average
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import NAMES, dtype_names
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.coefficients import Coefficients
from ckptavg.errors import InputError, counted
from ckptavg.filesystem.atomic import flush_folder
from ckptavg.filesystem.digest import digest
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.options import Options
from ckptavg.options.posterior import PosteriorOptions
from ckptavg.output import hugging_face_folder, loader_files, provenance
from ckptavg.output.sharded_files import open_files
from ckptavg.pipeline.posterior_file import KEPT, SIGMA
from ckptavg.pipeline.preflight import check_output
from ckptavg.pipeline.recorded_draw import recorded_gaussian
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
        source = digest(reader.files[0], options.algorithm) if options.algorithm else ""
        outputs = list[Output]()
        target = None if options.dtype is None else NAMES[options.dtype]
        specs = {n: replace(s, dtype=target) if target and s.dtype in FLOATING else s for n, s in stored.specs.items()}
        folder, total = options.destination[1] or Path(), len(folders) * sum(spec.nbytes for spec in specs.values())
        described = f"{counted(len(folders), 'draw')} to {folder}"
        for own in folders.values() if is_folder(folder) else ():
            check_output(own)
        blank = PosteriorResult(
            strategy=provenance.DRAWN, settings={"from": str(path)}, seed=options.seed, candidates=(),
            gaussian=asdict(stored.gaussian), warnings=[f"would write {described}: {total:,} bytes"],
        )  # fmt: skip
        if options.dry_run:
            return blank
        with hugging_face_folder.created_folder(folder), ExitStack() as undo:
            for sample, own in folders.items():
                remove_on_failure(own, undo)
                outputs.append(_write(stored, sample, own, specs, source))
            undo.pop_all()
        warnings = [f"wrote {described}"]
        if outputs[0].path.name.startswith("adapter") and not is_file(outputs[0].path.with_name(CONFIG_NAME)):
            reason = f"{CONFIG_NAME} is not beside {path}, so the draws have none: write the posterior into -o DIR/"
            warnings.append(reason)
        whole = replace(
            outputs[0], path=folder, data_digest="", sha256="", bytes=sum(output.bytes for output in outputs)
        )
        return replace(blank, draws=outputs, warnings=warnings, output=whole)


def remove_on_failure(options: Options, undo: ExitStack) -> None:
    """Let ``undo`` remove the directory of an output that is not there yet."""
    folder = options.destination[1]
    if folder and not os.path.lexists(folder):
        undo.callback(shutil.rmtree, folder, ignore_errors=True)


def _write(stored: "_Stored", sample: int, options: Options, specs: Mapping[str, StoredTensor], source: str) -> Output:
    noise = Noise(gaussian=stored.gaussian, sample=sample, deviation=stored.deviation, names=stored.names)
    mean, folder = stored.terms[-1], options.destination[1]
    assert folder is not None
    record = {
        "schema": provenance.SCHEMA, "version": version.own(), "strategy": provenance.DRAWN,
        "settings": {**asdict(stored.gaussian), "sample": sample},
        "posterior": {"name": mean.name, "digest": source},
    }  # fmt: skip
    metadata = {"format": "pt", provenance.KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))}
    dtype = dtype_names(specs.values())
    with (
        hugging_face_folder.created_folder(folder, loader_files.folders(mean)),
        open_files(
            folder, mean, specs, metadata, options.max_shard_size, force=options.force, digests=options.algorithm
        ) as out,
    ):
        for part in weighted_average(stored.terms, stored.coefficients(sample), specs, noise=noise):
            out.write(*part)
        with hugging_face_folder.copies(mean, folder, dtype, force=options.force):
            out.publish(metadata)
        flush_folder(out.path)
        return Output(
            path=out.path, data_digest=out.data_digest, sha256=out.sha256, bytes=out.size, dtype=dtype
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """An open file of a posterior.

    Attributes:
        terms: the K deviations and, as the last, the mean, each as if it was a checkpoint.
        gaussian, names: see `ckptavg.average.gaussian.Posterior`.
        specs: shapes, and dtypes of the candidates.
    """

    tensors: Mapping[str, StoredTensor]
    terms: Sequence[Checkpoint]
    gaussian: Gaussian
    names: Mapping[str, str]
    specs: Mapping[str, StoredTensor]

    def deviation(self, name: str, start: int, count: int) -> NDArray[np.float32]:
        """Read σ [C]; see `ckptavg.average.noise.Deviation`."""
        spec = self.tensors[SIGMA.format(name)]
        values_C = torch.empty(count, dtype=TORCH[spec.dtype])
        self.terms[-1].reader.read_into(spec, start, values_C.view(torch.uint8).numpy().data)
        return values_C.float().numpy()

    def coefficients(self, sample: int) -> Coefficients:
        """Return the coefficients of a draw: √(c/(K − 1)) z_k, and 1 for the mean."""
        k, others = self.gaussian.deviations, [name for name in self.specs if name not in self.names]
        drawn, mean = (*(self.gaussian.steps(sample) if k else ()), 1.0), (*[0.0] * k, 1.0)
        return Coefficients((mean, drawn), (("", *others), tuple(self.names)), linear=True)


def _opened(reader: Reader, settings: PosteriorOptions, seed: int) -> _Stored:
    """Return the posterior in a file, with the scale and the seed of this command; InputError if it is none."""
    try:
        record: Any = strict_json(reader.metadata[provenance.KEY])
        entries, kept = record["posterior"], record["not_averaged"]
        names, dtypes, file = entries["names"], entries["dtypes"], Path(entries["file"]).name
        for mapping in (names, dtypes, dict.fromkeys(kept, "")):
            if not all(isinstance(text, str) for pair in mapping.items() for text in pair):
                raise ValueError("a name is no text")
        if set(names) & set(kept):
            raise ValueError("a tensor is drawn and copied")
        gaussian = recorded_gaussian(entries["gaussian"], entries["candidates"])
        gaussian = gaussian if names else replace(gaussian, deviations=0)
        tensors = {name: as_real(spec) for name, spec in dict[str, Any](reader.tree).items()}
        mean = _check_tensors(tensors, names, dtypes, gaussian.deviations)
        terms = [
            mean | {name: _slice(tensors[KEPT.format(name)], i) for name in names} for i in range(gaussian.deviations)
        ]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        hint = "ckptavg swag CKPTS --posterior FILE writes one"
        raise InputError("is no posterior of ckptavg, or a damaged one", path=reader.path, hint=hint) from error
    like = replace(reader, path=reader.path.with_name(file))  # the draws get the file name of the candidates
    checkpoints = [
        Checkpoint(path=reader.path, name=reader.path.name, key="", tensors=own, reader=like, kept=frozenset(kept))
        for own in (*terms, mean)
    ]
    specs = {name: replace(mean[name], dtype=dtype, record="", offset=0) for name, dtype in dtypes.items()}
    scale = gaussian.scale if settings.scale is None else float(settings.scale)
    gaussian = replace(gaussian, seed=seed, scale=scale)
    return _Stored(tensors=tensors, terms=checkpoints, gaussian=gaussian, names=names, specs=specs)


def _check_tensors(
    tensors: Mapping[str, StoredTensor], names: Collection[str], dtypes: Mapping[str, str], k: int
) -> dict[str, StoredTensor]:
    """Return the tensors of the mean.

    Raises:
        KeyError, ValueError: if the tensors are not those of a posterior with these names, dtypes and K deviations.
    """
    patterns = (SIGMA, KEPT) if k else (SIGMA,)
    parts = {pattern.format(name) for name in names for pattern in patterns}
    mean = {name: spec for name, spec in tensors.items() if name not in parts}
    narrowed = [(mean[name].dtype, dtype) for name, dtype in dtypes.items()]
    fits = dtypes.keys() == mean.keys() and all(
        dtype == own or (own in ("F32", "F64") and dtype in FLOATING) for own, dtype in narrowed
    )
    for name in names:
        own, shapes = mean[name], {SIGMA: mean[name].shape, KEPT: (k, *mean[name].shape)}
        stored = {pattern: tensors[pattern.format(name)] for pattern in patterns}
        fits = fits and own.dtype in FLOATING
        fits = fits and all((spec.dtype, spec.shape) == (own.dtype, shapes[p]) for p, spec in stored.items())
    if not fits:
        raise ValueError("the tensors are not those of its metadata")
    return mean


def _slice(stacked: StoredTensor, i: int) -> StoredTensor:
    """Return the i-th of stacked tensors."""
    part = replace(stacked, shape=stacked.shape[1:])
    return replace(part, offset=stacked.offset + i * part.nbytes)
