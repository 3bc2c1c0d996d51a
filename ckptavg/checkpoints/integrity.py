"""Full check of a checkpoint: checksums, booleans, and NaN or infinite weights, which all candidates may share."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ckptavg.checkpoints.checkpoint import Checkpoint, chunks
from ckptavg.checkpoints.discover import NotFinite
from ckptavg.checkpoints.kept import is_averaged
from ckptavg.checkpoints.numbers import is_finite, widened
from ckptavg.errors import InputError, counted


def check(checkpoint: Checkpoint) -> dict[str, NotFinite]:
    """Read every tensor once; return those that are not finite, unless they are kept or that is allowed.

    Raises:
        InputError: if a checksum does not match, a BOOL is neither 0 nor 1, or the file changed since it was opened.
    """
    found: dict[str, NotFinite] = {}
    first_names = {checkpoint.spec(name): name for name in reversed(checkpoint.names)}  # tied tensors once
    for spec, name in sorted(first_names.items(), key=lambda item: (item[0].record, item[0].offset)):
        checked, finite = is_averaged(checkpoint, name) and not checkpoint.allow_nonfinite, True
        for _, chunk in chunks(spec, name, checkpoint.read_into):
            finite = finite and not (checked and not is_finite(chunk, spec.dtype))
        if not finite and (error := not_finite(checkpoint, name)):
            digest = hashlib.sha256()
            for _, chunk in chunks(spec, name, checkpoint.read_into):
                digest.update(chunk)
            found[name] = NotFinite(digest.digest(), _has_nan(checkpoint, name), error)
    checkpoint.check_unchanged()
    return found


def not_finite(checkpoint: Checkpoint, name: str) -> InputError | None:
    """Return the error for a tensor with NaN or infinite values: their number and the first; None if it has none."""
    count, first = 0, -1
    spec = checkpoint.spec(name)
    for start, chunk in chunks(spec, name, checkpoint.read_into):
        if not is_finite(chunk, spec.dtype):
            bad = np.flatnonzero(~np.isfinite(widened(chunk, spec.dtype)))
            first = start + int(bad[0]) if first < 0 else first
            count += len(bad)
    if not count:
        return None
    what = f"{counted(count, 'value')} {'is' if count == 1 else 'are'} NaN or infinite, the first at element {first}"
    return InputError(what, path=checkpoint.path, tensor=name, hint=checkpoint.hint)


def same_bytes(checkpoints: Sequence[Checkpoint], name: str) -> bool:
    """Return whether a tensor is bit-equal in all checkpoints; stops reading at the first chunk that differs."""
    spec = checkpoints[0].spec(name)
    readers = [chunks(checkpoint.spec(name), name, checkpoint.read_into) for checkpoint in checkpoints]
    numel, dtype = spec.numel, spec.dtype
    same_shape = all((c.spec(name).numel, c.spec(name).dtype) == (numel, dtype) for c in checkpoints)
    return same_shape and all(a == b for parts in zip(*readers, strict=True) for (_, a), (_, b) in pairwise(parts))


def is_shared(checkpoints: Sequence[Checkpoint], name: str) -> bool:
    """Return whether a tensor that is not finite may be copied: bit-equal in all candidates, such as a mask of −inf.

    One candidate alone may hold infinite values, but no NaN.
    """
    return same_bytes(checkpoints, name) and (len(checkpoints) > 1 or not _has_nan(checkpoints[0], name))


def refusal(bad: Sequence[Checkpoint], candidates: Sequence[Checkpoint], name: str) -> InputError | None:
    """Return the error for a tensor that is not finite in one of ``bad``, with a hint that leaves candidates over."""
    error = next(filter(None, (not_finite(checkpoint, name) for checkpoint in bad)), None)
    if error is not None and all(not_finite(checkpoint, name) for checkpoint in candidates):
        error.hint = (
            "no candidate is finite there: average such values with --allow-nonfinite, or copy them with --keep"
        )
    return error


def _has_nan(checkpoint: Checkpoint, name: str) -> bool:
    spec = checkpoint.spec(name)
    parts = chunks(spec, name, checkpoint.read_into)
    return any(bool(np.isnan(widened(part, spec.dtype)).any()) for _, part in parts)
