"""A tensor stored in pieces: runs of its elements in C order, each at a location of its own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``start + count`` of a tensor, stored in ``source`` from element ``at`` on."""

    start: int
    count: int
    source: str
    at: int


def gap(pieces: Sequence[Piece], numel: int) -> str | None:
    """Return why ``pieces`` (sorted by start) do not form a tensor of ``numel`` elements, or None if they do."""
    end = 0
    for piece in pieces:
        if piece.start != end:
            return f"elements {end} to {piece.start} {'are missing' if piece.start > end else 'are stored twice'}"
        end += piece.count
    return None if end == numel else f"its parts have {end} elements, but its shape has {numel}"


def read_pieces(
    pieces: Sequence[Piece], item: int, start: int, out: memoryview, read: Callable[[str, int, memoryview], None]
) -> None:
    """Fill ``out`` with the elements from index ``start`` on.

    Args:
        pieces: the whole tensor, sorted by start, without gaps.
        item: bytes per element.
        start: index of the first element to read.
        out: buffer of a multiple of ``item`` bytes.
        read: ``(source, first element, out)`` fills ``out`` from one source.
    """
    i = bisect_right(pieces, start, key=lambda piece: piece.start) - 1
    done, wanted = 0, len(out) // item
    while done < wanted:
        piece = pieces[i]
        skip = start + done - piece.start
        count = min(piece.count - skip, wanted - done)
        read(piece.source, piece.at + skip, out[done * item : (done + count) * item])
        done += count
        i += 1
