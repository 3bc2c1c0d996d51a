"""Which checkpoints are copies of one another: the same file by inode, or the same tensors by content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.errors import InputError
from ckptavg.readers import ITEM_SIZE

SAMPLES: Final = 64  # tensors, spread over the state dict, whose …
HEAD: Final = 4 << 10  # … first bytes are hashed
CHUNK: Final = 1 << 20


def find(checkpoints: Sequence[Checkpoint]) -> tuple[dict[int, tuple[int, str]], dict[int, InputError]]:
    """Copy → (original, how), by position; and what was found wrong. The first of several is the original.

    Content is compared in two stages, so that telling N different checkpoints apart reads some kilobytes of each: a
    SHA-256 of names, shapes and samples of the tensors, and only where two agree, all of their bytes. What is damaged
    behind the samples is nobody's copy, and is found wrong when it is read.
    """
    copies: dict[int, tuple[int, str]] = {}
    bad: dict[int, InputError] = {}
    by_inode: dict[object, int] = {}
    by_digest: dict[bytes, list[int]] = {}
    for i, checkpoint in enumerate(checkpoints):
        inodes = tuple(file.inode for file in checkpoint.reader.files)
        original = by_inode.setdefault(inodes, i)
        if original != i:
            copies[i] = (original, "is a link to")
            continue
        try:
            alike = by_digest.setdefault(digest(checkpoint), [])
        except InputError as error:
            bad[i] = error
            continue
        same = next((j for j in alike if _same_tensors(checkpoints[j], checkpoint)), None)
        if same is None:
            alike.append(i)
        else:
            copies[i] = (same, "holds the same weights as")
    return copies, bad


def digest(checkpoint: Checkpoint) -> bytes:
    """SHA-256 of the names, dtypes and shapes of all tensors and of the first bytes of up to `SAMPLES` of them."""
    digest = hashlib.sha256()
    names = checkpoint.names
    for i, name in enumerate(names):
        tensor = checkpoint.spec(name)
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode("utf-8", "surrogatepass"))
        if i % (len(names) // SAMPLES + 1) == 0:
            item = ITEM_SIZE[tensor.dtype]
            head = bytearray(min(tensor.nbytes, HEAD) // item * item)
            checkpoint.read_into(name, 0, memoryview(head))
            digest.update(head)
    return digest.digest()


def _same_tensors(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints with equal names, dtypes and shapes hold equal bytes; stops at the first difference."""
    with suppress(InputError):
        return _equal(a, b)
    return False


def _equal(a: Checkpoint, b: Checkpoint) -> bool:
    mine, other = memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK))
    for name in a.names:
        tensor = a.spec(name)
        item = ITEM_SIZE[tensor.dtype]
        for start in range(0, tensor.nbytes, CHUNK):
            size = min(CHUNK, tensor.nbytes - start)
            a.read_into(name, start // item, mine[:size])
            b.read_into(name, start // item, other[:size])
            if mine[:size] != other[:size]:
                return False
    return True
