"""A tensor stored in pieces: runs of its elements in C order, each a part of another tensor."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptavg.readers import Reader, StoredTensor


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
            yield Piece(start, taken, skip, run[i].reader, run[i].source)
        at, start, count, i = at + taken, start + taken, count - taken, i + 1


def read_pieces(pieces: Sequence[Piece], item: int, start: int, out: memoryview) -> None:
    """Fill ``out`` with elements of ``item`` bytes from index ``start`` on; ``pieces`` are sorted and without a gap."""
    stop = start + len(out) // item
    i = bisect_right(pieces, start, key=lambda piece: piece.start) - 1
    while start < stop:
        skip = start - pieces[i].start
        count = min(pieces[i].count - skip, stop - start)
        pieces[i].reader.read_into(pieces[i].source, pieces[i].at + skip, out[: count * item])
        start, out, i = start + count, out[count * item :], i + 1
