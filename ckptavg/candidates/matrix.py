"""`Matrix`: N candidates as rows of D elements, in some encoding.

Shape suffixes: N = candidates, D = elements of one dtype, C = columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Matrix(Protocol):
    """N rows of D elements in some encoding: w_i = centre + row i, decoded a piece at a time."""

    @property
    def mean_D(self) -> Tensor | None:
        """[D], what rows are differences from; None is 0."""
        ...

    @property
    def nbytes(self) -> int:
        """What the rows take on the device, without the centre."""
        ...

    @property
    def squared_errors(self) -> Tensor:
        """[2], what the encoding lost: ‖d̂ − d‖² and ‖d‖² over all rows, d being their differences from the centre."""
        ...

    def row(self, i: int) -> Tensor:
        """[D], where to put row ``i`` before `encode`; it may be the same place for all."""
        ...

    def encode(self, i: int) -> None:
        """Encode what is in the row."""
        ...

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """([N, C], columns): all columns from ``start`` to ``stop``, float32 or wider, valid until the next piece."""
        ...
