"""Unquantized candidates: one row each, in the model's dtype.

Shape suffixes: N = candidates, D = elements of one dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

COLUMNS: Final = 1 << 20  # columns of a 16-bit matrix converted to float32 at a time


class Dense:
    """The matrix [N, D] itself; see `ckptavg.candidates.Matrix`."""

    mean_D = None
    squared_errors = torch.zeros(2)

    def __init__(self, n: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows_ND = torch.empty(n, size, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """See `Matrix.nbytes`."""
        return self._rows_ND.nbytes

    def row(self, i: int) -> Tensor:
        """See `Matrix.row`."""
        return self._rows_ND[i]

    def encode(self, i: int) -> None:
        """See `Matrix.encode`; rows are stored as loaded."""

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
