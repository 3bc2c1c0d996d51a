"""The `Matrix` protocol: N candidates as rows of D elements, exact or quantized.

Shape suffixes: N = candidates, D = elements of one dtype, C = columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Matrix(Protocol):
    """N encoded rows of D elements, w_i = mean + row i, decoded one piece at a time."""

    @property
    def mean_D(self) -> Tensor | None:
        """[D], the vector that rows are stored relative to; None means zero."""
        ...

    @property
    def nbytes(self) -> int:
        """Size of the rows on the device in bytes, without the mean."""
        ...

    @property
    def squared_errors(self) -> Tensor:
        """[2], the encoding error ‖d̂ − d‖² and ‖d‖² over all rows, where d is a row's difference from the mean."""
        ...

    def row(self, i: int) -> Tensor:
        """Return the [D] buffer to load row ``i`` into before `encode`; implementations may reuse one buffer."""
        ...

    def encode(self, i: int) -> None:
        """Encode row ``i`` from its buffer."""
        ...

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield ([N, C], columns) from ``start`` to ``stop``, float32 or wider; each is valid until the next one."""
        ...
