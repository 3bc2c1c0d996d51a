"""A tensor that lies in pieces: runs of its elements in C order, each of them somewhere else."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """``count`` elements of a tensor, from its element ``start`` on: those of ``source`` from element ``at`` on."""

    start: int
    count: int
    source: str
    at: int


def gap(pieces: Sequence[Piece], numel: int) -> str | None:
    """What is wrong with ``pieces`` (sorted by start) as a tensor of ``numel`` elements, or None."""
    end = 0
    for piece in pieces:
        if piece.start != end:
            return f"elements {end} to {piece.start} {'are missing' if piece.start > end else 'lie in it twice'}"
        end += piece.count
    return None if end == numel else f"its parts have {end} elements, but its shape {numel}"


def read_pieces(
    pieces: Sequence[Piece], item: int, start: int, out: memoryview, read: Callable[[str, int, memoryview], None]
) -> None:
    """Fill ``out`` with the elements from number ``start`` on.

    Args:
        pieces: all of the tensor, sorted by start, without a gap.
        item: bytes of an element.
        start: the first element wanted.
        out: a multiple of ``item`` bytes.
        read: (source, first element, out) fills ``out`` from one source.
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
