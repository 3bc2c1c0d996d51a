"""Means of subsets that change by a few candidates at a time.

Shape suffixes: N = candidates, R = selected rows, D = elements of one dtype, C = columns of a piece.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

from ckptavg.candidates import plan
from ckptavg.candidates.flat import Slot, overlapping

_CHUNK: Final = 1 << 18  # elements updated at once, which fit a CPU's cache
Read: TypeAlias = Callable[[Sequence[int]], Iterator[tuple[Iterable[Tensor], slice]]]


class RunningSum:
    """Σ_{i ∈ S} w_i for a subset S that changes by a few candidates at a time.

    Only the rows in which a subset differs from the previous one are read. Each term is first rounded to a multiple of
    q = 2^e·2⁻⁵², where 2^e > 2N·max|w| is a power of two per tensor and the maximum is over all candidates. Every sum
    of such terms is representable in float64, so additions and subtractions are exact: the mean of a subset has the
    same bits regardless of the preceding subsets, also in a resumed run. It is within N·2⁻⁵⁰·max|w| of the exact mean
    before it is rounded to the model's dtype.

    Memory: 8 bytes per element on the host; if that is more than half of the free memory, the sum is not kept, and
    every subset is summed from scratch, to the same bits.
    """

    def __init__(self, n: int, size: int, slots: Sequence[Slot]) -> None:
        self._n = n
        self._slots = slots
        self._largest = [0.0] * len(slots)
        keep = 16 * size < plan.free_memory(torch.device("cpu"))
        self._sum_D = torch.zeros(size, dtype=torch.float64) if keep else None
        self._summed: frozenset[int] = frozenset()
        self._total, self._term = torch.empty(2, min(size, _CHUNK), dtype=torch.float64)

    def observe(self, rows: Iterable[Tensor], part: slice) -> None:
        """Update max|w| from columns of some rows; must be called for all rows before the first `mean`."""
        for row_C in rows:
            for k, begin, end in overlapping(self._slots, part.start, part.stop):
                low, high = torch.stack(torch.aminmax(row_C[begin - part.start : end - part.start])).tolist()
                self._largest[k] = max(self._largest[k], -low, high)

    def mean(self, chosen: Sequence[int], read: Read, out_D: Tensor, mean_D: Tensor | None = None) -> None:
        """Write the mean of the rows ``chosen`` to ``out_D``, of any dtype and on any device.

        Args:
            read: see `ckptavg.candidates.products.Matrix.row_blocks`.
            mean_D: is added, if rows are stored as differences from it.
        """
        wanted, before = frozenset(chosen), self._summed
        if len(wanted ^ before) > len(wanted):
            before = frozenset[int]()
        self._summed = frozenset()  # until the pass completes: an interrupted one leaves the sum partly updated
        changed = sorted(wanted ^ before)
        for rows, part in read(changed):
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
                        # adding 1.5·2⁵²·q rounds a number to a multiple of q
                        term_C.copy_(row_C[start - part.start : stop - part.start]).add_(shift).sub_(shift)
                        total_C.add_(term_C, alpha=1 if i in wanted else -1)
                    torch.div(total_C, len(wanted), out=term_C)
                    if mean_D is not None:
                        term_C += mean_D[start:stop]
                    out_D[start:stop] = term_C.to(out_D.dtype)
        if self._sum_D is not None:
            self._summed = wanted
