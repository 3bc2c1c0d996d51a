"""Mean of a subset of rows of a streamed matrix, from a sum updated between subsets.

Shape suffixes: N = candidates, D = elements of one dtype, C = columns of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ckptavg.candidates import budget
from ckptavg.candidates.flat import Slot, overlapping
from ckptavg.candidates.streamed import Streamed

_CHUNK: Final = 1 << 18  # elements summed at a time, which fit a CPU's cache


class RunningSum:
    """Σ_{i ∈ S} w_i for a subset S that changes by a few candidates at a time.

    Only the rows in which a subset differs from the previous one are read. Each term is first rounded to a multiple of
    q = 2^e·2⁻⁵², where 2^e > 2N·max|w| is a power of two per tensor and the maximum is over all candidates. Every sum
    of such terms is representable in float64, so additions and subtractions are exact: the mean of a subset has the
    same bits regardless of the preceding subsets, also in a resumed run. It is within N·2⁻⁵⁰·max|w| of the exact mean
    before it is rounded to the model's dtype.

    Memory: 8 bytes per element on the host; if that is more than half of the free memory, the sum is not kept, and
    every subset is summed from scratch, to the same bits.

    Args:
        matrix: the rows.
        slots: position of each tensor in a row, in order; together they are the whole row.
    """

    def __init__(self, matrix: Streamed, slots: Sequence[Slot]) -> None:
        self._matrix = matrix
        self._slots = slots
        self._size = slots[-1].start + slots[-1].numel
        self._largest = [0.0] * len(slots)
        keep = 16 * self._size < budget.free_memory(torch.device("cpu"))
        self._sum_D = torch.zeros(self._size, dtype=torch.float64) if keep else None
        self._summed: frozenset[int] = frozenset()
        self._total, self._term = torch.empty(2, min(self._size, _CHUNK), dtype=torch.float64)

    def observe(self, row_D: Tensor) -> None:
        """Update max|w| from a row; must be called for every row before the first `mean`."""
        parts = [row_D[slot.start :][: slot.numel] for slot in self._slots]
        largest = torch.stack([part.abs().max() if len(part) else part.new_zeros(()) for part in parts]).tolist()
        self._largest = list(map(max, self._largest, largest))

    def mean(self, chosen: Sequence[int], out_D: Tensor) -> None:
        """Write the mean of the rows ``chosen`` to ``out_D``, of any dtype and on any device."""
        wanted, before = frozenset(chosen), self._summed
        if len(wanted ^ before) > len(wanted):
            before = frozenset[int]()
        self._summed = frozenset()  # until the pass completes: an interrupted one leaves the sum partly updated
        changed = sorted(wanted ^ before)
        for rows, part in self._matrix.on_host(changed, 0, self._size):
            for k, begin, end in overlapping(self._slots, part.start, part.stop):
                shift = math.ldexp(1.5, math.frexp(2 * self._matrix.n * self._largest[k])[1])
                for start in range(begin, end, _CHUNK):
                    stop = min(start + _CHUNK, end)
                    total_C, term_C = self._total[: stop - start], self._term[: stop - start]
                    if self._sum_D is not None:
                        total_C = self._sum_D[start:stop]
                    if not before:
                        total_C.zero_()
                    for i, row_C in zip(changed, rows, strict=True):
                        # adding 1.5·2⁵²·q rounds a number to a multiple of q
                        term_C.copy_(row_C[start - part.start : stop - part.start]).add_(shift).sub_(shift)
                        total_C.add_(term_C, alpha=1 if i in wanted else -1)
                    out_D[start:stop] = torch.div(total_C, len(wanted), out=term_C).to(out_D.dtype)
        if self._sum_D is not None:
            self._summed = wanted
