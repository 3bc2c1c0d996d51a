"""From coefficients to the file: averaged exactly, BatchNorm recomputed, scored as it lies, then given its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import torch

from ckptavg import companions, provenance
from ckptavg.average import not_averaged, output_specs, weighted_average
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.dtypes import FLOATING, TORCH
from ckptavg.evaluator import Evaluator, Watch
from ckptavg.objective import Score, Split, Strategy
from ckptavg.options import Options, destination
from ckptavg.result import Output
from ckptavg.strategies import strategies
from ckptavg.write import SafetensorsFile

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MEGABYTE: Final = 10**6


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The file, its own scores, and the names of the files copied beside it."""

    output: Output
    scores: Mapping[Split, Score]
    copied: Sequence[str]


def name_of(strategy: Strategy) -> str:
    """The name of a strategy's command."""
    return next(name for name, cls in strategies().items() if isinstance(strategy, cls))


def finish(
    checkpoints: Sequence[Checkpoint],
    coefficients: Coefficients,
    strategy: Strategy,
    options: Options,
    evaluator: Evaluator | None,
    watch: Watch | None,
) -> Finished:
    """Write the average of ``checkpoints`` where ``options`` say, whole or not at all.

    Args:
        checkpoints: all candidates, open.
        coefficients: theirs.
        strategy: what found them, for the metadata.
        options: output, dtype and force.
        evaluator: scores the file; None where there is nothing to score it with.
        watch: is told the progress.
    """
    path, folder = destination(options.output)
    with companions.made(folder):
        output, scores = _write(path, checkpoints, coefficients, strategy, options, evaluator, watch)
    copied = companions.copy(checkpoints[coefficients.selected[-1]], folder) if folder else ()
    return Finished(output=output, scores=scores, copied=copied)


def _write(
    path: Path,
    checkpoints: Sequence[Checkpoint],
    coefficients: Coefficients,
    strategy: Strategy,
    options: Options,
    evaluator: Evaluator | None,
    watch: Watch | None,
) -> tuple[Output, dict[Split, Score]]:
    """Stream the average into a file beside its destination, and commit it when it is finished and scored."""
    first = checkpoints[0]
    specs = output_specs(first, options.dtype)
    kept = not_averaged(first)
    recomputed = sorted(set(evaluator.statistics) & specs.keys()) if evaluator else []
    metadata = provenance.metadata(
        checkpoints, coefficients, name_of(strategy), asdict(strategy),  # pyright: ignore[reportArgumentType]
        dtype=options.dtype, not_averaged=kept, recomputed=recomputed,
    )  # fmt: skip
    scores: dict[Split, Score] = {}
    with SafetensorsFile(path, specs, metadata, force=options.force) as out:
        done, total = 0, sum(spec.nbytes for spec in specs.values())
        for name, offset, data in weighted_average(checkpoints, coefficients, specs):
            out.write(name, offset, data)
            done += len(data)
            if watch:
                watch("averaging, MB", done // MEGABYTE, -(-total // MEGABYTE), {})
        if evaluator:
            state = evaluator.adopt(specs, out.read_into)
            for name in recomputed:
                out.write(name, 0, _bytes(state[name], TORCH[specs[name].dtype]))
            scores = {split: evaluator.score_adopted(coefficients, split) for split in evaluator.splits}
        for i in coefficients.selected:
            checkpoints[i].check_unchanged()
        out.commit()
    dtypes = sorted({spec.dtype for spec in specs.values() if spec.dtype in FLOATING})
    names = [str(TORCH[dtype]).removeprefix("torch.") for dtype in dtypes]
    return Output(
        path=path, sha256=out.sha256, bytes=out.size, dtype=", ".join(names), not_averaged=kept, recomputed=recomputed
    ), scores


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    data = bytearray(tensor.numel() * dtype.itemsize)
    torch.frombuffer(data, dtype=dtype).copy_(tensor.flatten())
    return memoryview(data)
