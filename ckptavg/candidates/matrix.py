"""The `Matrix` protocol, N candidates as rows of D elements, and the matrix that holds them as they are.

Shape suffixes: N = candidates, D = elements of one dtype, C = columns of a block.
"""

from collections.abc import Iterator
from typing import Final, Protocol

import torch
from torch import Tensor

COLUMNS: Final = 1 << 20  # columns of a 16-bit matrix converted to float32 at a time


class Matrix(Protocol):
    """N encoded rows of D elements, w_i = mean + row i, decoded one piece at a time."""

    mean_D: Tensor | None  # [D], the vector that rows are stored relative to, set before `encode`; None means zero
    nbytes: int  # size of the rows on the device, without the mean
    squared_errors: Tensor  # [2], ‖d̂ − d‖² of the encoding and ‖d‖² over all rows; d is the difference from the mean

    def encode(self, i: int, row_D: Tensor) -> None:
        """Store row ``i``; ``row_D`` [D] may be overwritten afterwards."""

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield ([N, C], columns) from ``start`` to ``stop``, float32 or wider; each is valid until the next one."""
        ...


class Dense:
    """The matrix [N, D] itself, in the dtype and on the device of ``example_D`` [D]."""

    mean_D: Tensor | None = None
    squared_errors = torch.zeros(2)

    def __init__(self, n: int, example_D: Tensor) -> None:
        self._rows_ND = example_D.new_empty(n, len(example_D))
        self.nbytes = self._rows_ND.nbytes

    def encode(self, i: int, row_D: Tensor) -> None:
        """See `Matrix.encode`."""
        self._rows_ND[i] = row_D

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """See `Matrix.column_blocks`: one piece, or for 16-bit dtypes pieces converted to float32.

        A coefficient of 1/5 rounded to bfloat16 is 0.1 % too large, which would scale every weight; and a dot product
        of millions of terms needs more than three digits.
        """
        if self._rows_ND.dtype.itemsize >= 4:
            yield self._rows_ND[:, start:stop], slice(start, stop)
            return
        for first in range(start, stop, COLUMNS):
            part = slice(first, min(first + COLUMNS, stop))
            yield self._rows_ND[:, part].to(torch.float32), part
