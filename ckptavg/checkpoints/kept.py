"""Tensors that are copied from one candidate instead of being averaged."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.derived import find
from ckptavg.checkpoints.numbers import numbers
from ckptavg.errors import UsageError
from ckptavg.readers import FLOATING


def is_averaged(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor is averaged: floating point, and not `Checkpoint.kept`."""
    return checkpoint.spec(name).dtype in FLOATING and name not in checkpoint.kept


def kept_names(checkpoint: Checkpoint, keep: Sequence[str], average: Sequence[str] = ()) -> frozenset[str]:
    """Return the names that ``keep`` matches and ``average`` does not; names that share memory are kept together."""
    names = checkpoint.names
    specs = {checkpoint.spec(name) for name in _matching(names, keep)}
    specs -= {checkpoint.spec(name) for name in _matching(names, average)}
    return frozenset(name for name in names if checkpoint.spec(name) in specs)


def keeping(
    checkpoints: Sequence[Checkpoint], keep: Sequence[str], average: Sequence[str] = (), *, derived: bool = True
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints with `Checkpoint.kept` set to the `kept_names` of the first, and its `derived` tensors.

    ``derived=False`` averages tensors that are functions of others, as version 0.1 did.

    Raises:
        UsageError: if a pattern matches no tensor, ``average`` only tensors that are not floating point, or every
            floating-point tensor is kept.
    """
    first = checkpoints[0]
    floating = [name for name in first.names if first.spec(name).dtype in FLOATING]
    for option, glob in (*(("--keep", glob) for glob in keep), *(("--average", glob) for glob in average)):
        matching = _matching(first.names, [glob])
        if not matching:
            close = get_close_matches(glob, first.names)
            hint = f"names like it: {', '.join(close)}" if close else f"its names begin with {first.names[0]}"
            raise UsageError(f"{option} {glob} matches no tensor", path=first.path, hint=hint)
        if option == "--average" and not _matching(floating, [glob]):
            message = f"dtype {first.spec(matching[0]).dtype} cannot be averaged exactly, so {option} has no effect"
            raise UsageError(message, path=first.path, tensor=matching[0])
    kept = kept_names(first, keep, average)
    if kept and kept.issuperset(floating):
        raise UsageError("--keep leaves no tensor to average", hint="`ckptavg last` copies the last checkpoint")
    if not derived:
        return tuple(replace(checkpoint, kept=kept) for checkpoint in checkpoints)
    chosen = kept.union(_matching(first.names, average))
    functions = find(first.tensors, chosen.__contains__, partial(_values, checkpoints[-1]))
    kept = kept.union(*functions.kinds.values())
    return tuple(replace(checkpoint, kept=kept, derived=functions) for checkpoint in checkpoints)


def _values(checkpoint: Checkpoint, name: str) -> NDArray[np.float64]:
    spec = checkpoint.spec(name)
    return numbers(checkpoint.read(name), spec.dtype).reshape(spec.shape)


def _matching(names: Sequence[str], globs: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
