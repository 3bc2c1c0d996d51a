"""Find the sources that an output's metadata name, and give them the recorded steps."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import open_checkpoint
from ckptavg.checkpoints.listing import CheckpointPath
from ckptavg.errors import CkptavgError, InputError
from ckptavg.filesystem.digest import NAMES, algorithm_of, digest
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.pipeline.recorded_provenance import Source


def with_steps(sources: Sequence[Source], checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
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


def locate(source: Source, folder: Path, output: Path) -> Checkpoint:
    """Open the checkpoint under ``folder`` that has the name, the files and the digests of ``source``."""
    if not is_folder(folder):
        raise InputError("no such directory", path=folder)
    opened: list[Checkpoint] = []
    failures: list[CkptavgError] = []
    for place in sorted(places(Path(source.name), folder), key=lambda place: place.weights):
        try:
            opened.append(_open(place, source))
        except CkptavgError as error:
            failures.append(error)
        if opened and (all(source.digests.values()) or len(opened) > 1):
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


def places(name: Path, folder: Path) -> Iterator[CheckpointPath]:
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
        if odd := sorted(files.keys() ^ source.digests.keys()):
            what = "is not a file of the checkpoint" if odd[0] in source.digests else "has no digest in the metadata"
            raise InputError(f"its file {odd[0]} {what}", path=place.path)
        for name, file in files.items():
            algorithm = algorithm_of(source.digests[name])
            if algorithm and digest(file, algorithm) != source.digests[name]:
                what = f"is not the file the average was made from: its {NAMES[algorithm]} differs"
                raise InputError(what, path=file.path)
    except BaseException:
        checkpoint.reader.close()
        raise
    return checkpoint
