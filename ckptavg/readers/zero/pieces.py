"""A tensor stored in pieces: runs of its elements in C order, each a part of another tensor."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptavg.readers import ITEM_SIZE, Reader, StoredTensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``start + count`` of a tensor, stored in ``source`` from its element ``at`` on."""

    start: int
    count: int
    at: int
    reader: Reader
    source: StoredTensor


def gap(pieces: Sequence[Piece], numel: int) -> str | None:
    """Return why ``pieces`` (sorted by start) do not form a tensor of ``numel`` elements, or None if they do."""
    end = 0
    for piece in pieces:
        if piece.start != end:
            return f"elements {end} to {piece.start} {'are missing' if piece.start > end else 'are stored twice'}"
        end += piece.count
    return None if end == numel else f"its parts have {end} elements, but its shape has {numel}"


def cut(run: Sequence[Piece], at: int, count: int, start: int) -> Iterator[Piece]:
    """Yield up to ``count`` elements of ``run`` from ``at`` on as pieces of a weight from its element ``start`` on."""
    i = max(bisect_right(run, at, key=lambda piece: piece.start) - 1, 0)
    while count > 0 and i < len(run):
        skip = at - run[i].start
        taken = max(min(count, run[i].count - skip), 0)
        if taken:
            yield Piece(start, taken, run[i].at + skip, run[i].reader, run[i].source)
        at, start, count, i = at + taken, start + taken, count - taken, i + 1


def read_pieces(pieces: Sequence[Piece], tensor: StoredTensor, start: int, out: memoryview) -> None:
    """Read a tensor as `Reader.read_into` does; its ``pieces`` are sorted and without a gap."""
    item = ITEM_SIZE[tensor.dtype]
    for piece in cut(pieces, start, len(out) // item, 0):
        piece.reader.read_into(piece.source, piece.at, out[piece.start * item :][: piece.count * item])
