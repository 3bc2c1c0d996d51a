"""Find copies among checkpoints: equal inodes, or tensors of equal content."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint, chunks
from ckptavg.errors import InputError
from ckptavg.readers import ITEM_SIZE

SAMPLES: Final = 64  # number of tensors, spread over the state dict, that are sampled
HEAD: Final = 4 << 10  # bytes hashed at the beginning of each sampled tensor


def find(checkpoints: Sequence[Checkpoint]) -> tuple[dict[int, tuple[int, str]], dict[int, InputError]]:
    """Return {copy: (original, relation)} and {bad: error} by index; the first of several copies is the original.

    Content is compared in two stages, so that distinguishing N checkpoints reads some kilobytes of each: a SHA-256 of
    names, shapes and samples of the tensors, and all bytes only if two digests agree. A checkpoint that is damaged
    beyond the samples counts as no copy; reading it later finds the damage.
    """
    copies: dict[int, tuple[int, str]] = {}
    bad: dict[int, InputError] = {}
    by_inode: dict[object, int] = {}
    by_digest: dict[bytes, list[int]] = {}
    for i, checkpoint in enumerate(checkpoints):
        if (original := by_inode.setdefault(tuple(file.inode for file in checkpoint.reader.files), i)) != i:
            copies[i] = (original, "is a link to")
            continue
        try:
            alike = by_digest.setdefault(digest(checkpoint), [])
        except InputError as error:
            bad[i] = error
            continue
        original = next((j for j in alike if _same_tensors(checkpoints[j], checkpoint)), None)
        if original is None:
            alike.append(i)
        else:
            copies[i] = (original, "holds the same weights as")
    return copies, bad


def digest(checkpoint: Checkpoint) -> bytes:
    """Return the SHA-256 of all names, dtypes and shapes and of the first bytes of up to `SAMPLES` tensors."""
    digest = hashlib.sha256()
    names = checkpoint.names
    for i, name in enumerate(names):
        tensor = checkpoint.spec(name)
        digest.update(repr((name, *tensor.in_file)).encode("utf-8", "surrogatepass"))
        if i % (len(names) // SAMPLES + 1) == 0:
            item = ITEM_SIZE[tensor.dtype]
            head = bytearray(min(tensor.nbytes, HEAD) // item * item)
            checkpoint.read_into(name, 0, memoryview(head))
            digest.update(head)
    return digest.digest()


def _same_tensors(a: Checkpoint, b: Checkpoint) -> bool:
    """Return whether checkpoints of equal names, dtypes and shapes have equal bytes; stop at the first difference."""
    with suppress(InputError):
        for name in a.names:
            mine, others = chunks(a.spec(name), name, a.read_into), chunks(b.spec(name), name, b.read_into)
            if any(x != y for x, y in zip(mine, others, strict=True)):
                return False
        return True
    return False
