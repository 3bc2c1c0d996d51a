"""Candidates as they are, in the device's memory.

Shape suffixes: N = candidates, D = elements of one dtype, C = columns of a piece.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from ckptavg.candidates import plan
from ckptavg.candidates.products import kernels

COLUMNS: Final = 1 << 20  # most columns of a piece that is computed at once


class Dense:
    """The matrix [N, D] itself, in the dtype and on the device of ``example_D`` [D]."""

    mean_D: Tensor | None = None
    squared_errors = torch.zeros(2)

    def __init__(self, n: int, example_D: Tensor) -> None:
        size, on_gpu = len(example_D), kernels(example_D.device)
        self.rows_ND = example_D.new_empty(n, size + (-size % on_gpu.COLUMNS if on_gpu else 0))[:, :size]
        self.nbytes = self.rows_ND.nbytes
        self.products = on_gpu and on_gpu.Dense(self.rows_ND)

    def encode(self, i: int, row_D: Tensor) -> None:
        """See `Matrix.encode`."""
        self.rows_ND[i] = row_D

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """See `Matrix.column_blocks`: one piece, or for 16-bit dtypes pieces converted to float32.

        A coefficient of 1/5 rounded to bfloat16 is 0.1 % too large, which would scale every weight; and a dot product
        of millions of terms needs more than three digits.
        """
        if self.rows_ND.dtype.itemsize >= 4:
            yield self.rows_ND[:, start:stop], slice(start, stop)
            return
        n = len(self.rows_ND)
        step = COLUMNS if n <= plan.FEW_ROWS else plan.columns(n, stop, 4)
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            yield self.rows_ND[:, part].to(torch.float32), part

    def row_blocks(self, rows: Sequence[int]) -> Iterator[tuple[Sequence[Tensor], slice]]:
        """See `Matrix.row_blocks`: all columns, as they are stored."""
        yield [self.rows_ND[i] for i in rows], slice(0, self.rows_ND.shape[1])
