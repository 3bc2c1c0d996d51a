"""The mean of some rows of a streamed matrix, from a sum that is kept from one subset to the next.

Shape suffixes: N = candidates, D = elements of one dtype, C = some of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ckptavg.candidates.flat import Slot, overlapping
from ckptavg.candidates.streamed import Streamed

_CHUNK: Final = 1 << 18  # elements summed at a time: they stay in a processor's cache


class RunningSum:
    """Σ_{i ∈ S} w_i for a subset S that changes by a few candidates at a time.

    A subset that differs from the one before in a few candidates costs those rows, instead of all of its own. Each
    term is first rounded to a multiple of q = 2^e·2⁻⁵², 2^e > 2N·max|w| being a power of two for each tensor, the
    maximum that over all candidates. Every sum of such terms is a float64, so adding and taking away are exact: the
    mean of a subset has the same bits by whatever subsets it was reached, in a resumed run too. It is within
    N·2⁻⁵⁰·max|w| of the exact mean before it is rounded to the model's dtype.

    Memory: 8 bytes an element on the host; where they are not to be had, every subset is summed anew, to the same bits.

    Args:
        matrix: the rows.
        slots: where the tensors lie in a row.
        n: the number of rows.
        size: D.
        keep: whether the sum is kept.
    """

    def __init__(self, matrix: Streamed, slots: Sequence[Slot], n: int, size: int, *, keep: bool) -> None:
        self._matrix = matrix
        self._slots = slots
        self._n = n
        self._size = size
        self._largest = [0.0] * len(slots)
        self._sum_D = torch.zeros(size, dtype=torch.float64) if keep else None
        self._summed: frozenset[int] = frozenset()
        self._total, self._term = torch.empty(2, min(size, _CHUNK), dtype=torch.float64)

    def look_at(self, row_D: Tensor) -> None:
        """Be shown a row; before the first mean it must have been all of them."""
        parts = [row_D[slot.start :][: slot.numel] for slot in self._slots]
        largest = torch.stack([part.abs().max() if len(part) else part.new_zeros(()) for part in parts]).tolist()
        self._largest = [max(pair) for pair in zip(self._largest, largest, strict=True)]

    def mean(self, chosen: Sequence[int], out_D: Tensor) -> None:
        """Put the mean of the rows ``chosen`` into ``out_D``, of any dtype and on any device."""
        wanted, before = frozenset(chosen), self._summed
        if len(wanted ^ before) > len(wanted):
            before = frozenset[int]()
        self._summed = frozenset()  # until all of it is summed: an interrupted pass has changed a part
        changed = sorted(wanted ^ before)
        for rows, part in self._matrix.on_host(changed, 0, self._size):
            for k, begin, end in overlapping(self._slots, part.start, part.stop):
                shift = math.ldexp(1.5, math.frexp(2 * self._n * self._largest[k])[1])
                for start in range(begin, end, _CHUNK):
                    stop = min(start + _CHUNK, end)
                    total_C, term_C = self._total[: stop - start], self._term[: stop - start]
                    if self._sum_D is not None:
                        total_C = self._sum_D[start:stop]
                    if not before:
                        total_C.zero_()
                    for i, row_C in zip(changed, rows, strict=True):
                        # a number plus 1.5·2⁵²·q is rounded to a multiple of q
                        term_C.copy_(row_C[start - part.start : stop - part.start]).add_(shift).sub_(shift)
                        total_C.add_(term_C, alpha=1 if i in wanted else -1)
                    out_D[start:stop] = torch.div(total_C, len(wanted), out=term_C).to(out_D.dtype)
        if self._sum_D is not None:
            self._summed = wanted
