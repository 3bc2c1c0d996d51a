"""Both products with a candidate matrix, w = Pᵀc and P g, each in one pass over the matrix.

Shape suffixes: N = candidates, G = groups of tensors, D = elements of one dtype, Q = the parameters among them,
C = columns of a piece.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ckptavg.candidates.flat import Flat, runs
from ckptavg.coefficients import Groups

INLINE: Final = 1 << 14  # elements of an operation that torch does not divide among threads


class Products(Protocol):
    """The products over columns ``start`` to ``stop``, from rows as they are stored."""

    def mix(self, c_N: Tensor, out_D: Tensor, start: int, stop: int) -> None:
        """Set these columns of ``out_D`` [D] to Σ_i c_i w_i."""

    def dot(self, g_D: Tensor, start: int, stop: int) -> Tensor:
        """Return [N], Σ_d w_id g_d."""
        ...


class Matrix(Protocol):
    """N encoded rows of D elements, w_i = mean + row i, decoded one piece at a time."""

    mean_D: Tensor | None  # [D], the vector that rows are stored relative to, set before `encode`; None means zero
    nbytes: int  # size of the rows on the device, without the mean
    squared_errors: Tensor  # [2], ‖d̂ − d‖² of the encoding and ‖d‖² over all rows; d is the difference from the mean
    products: Products | None  # None: they are taken piece by piece, from `column_blocks`

    def encode(self, i: int, row_D: Tensor) -> None:
        """Store row ``i``; ``row_D`` [D] may be overwritten afterwards."""

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield ([N, C], columns) from ``start`` to ``stop``, float32 or wider; each is valid until the next one."""
        ...

    def row_blocks(self, rows: Sequence[int]) -> Iterator[tuple[Iterable[Tensor], slice]]:
        """Yield ([R, C], columns) of R of the rows, in a floating-point dtype; each is valid until the next one."""
        ...


def kernels(device: torch.device) -> Any:
    """Return the module `ckptavg.candidates.kernels`, or None where it is of no use; see `why_slow`."""
    return import_module("ckptavg.candidates.kernels") if device.type == "cuda" and not why_slow() else None


@cache
def why_slow() -> str:
    """Return why Triton cannot compile kernels for this machine's GPU, in one line; empty if it can."""
    try:
        import_module("ckptavg.candidates.kernels").check()
    except Exception as error:  # of any kind: it is missing, finds no C compiler, does not know the GPU
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def mix(flat: Flat, matrix: Matrix, c_GN: Tensor, groups: Groups) -> None:
    """Set ``flat.weights_D`` to Σ_i c_gi w_i, where g is the group of each tensor.

    On a CPU only rows with a coefficient are read, if they are at most half of the rows.
    """
    weights_D, mean_D = flat.weights_D, matrix.mean_D
    if matrix.products is not None:
        for start, stop, g in runs(flat.slots, groups, len(weights_D)):
            matrix.products.mix(c_GN[g], weights_D, start, stop)
        return
    if c_GN.device.type == "cpu" and weights_D.device.type == "cpu":
        columns = c_GN.t().tolist()
        rows = [i for i, column in enumerate(columns) if any(column)]
        if 2 * len(rows) <= c_GN.shape[1]:
            c_GR = [[columns[i][g] for i in rows] for g in range(len(c_GN))]
            _mix_rows(flat, matrix, c_GR, rows, groups)
            return
    for run_NC, part, g in column_runs(flat, matrix, groups, len(weights_D)):
        c_N = c_GN[g].to(run_NC)
        if run_NC.dtype != weights_D.dtype:
            w_C = run_NC.t().mv(c_N)
            weights_D[part] = w_C if mean_D is None else mean_D[part] + w_C
        elif mean_D is None:
            torch.mv(run_NC.t(), c_N, out=weights_D[part])
        else:
            torch.addmv(mean_D[part], run_NC.t(), c_N, out=weights_D[part])


def _mix_rows(flat: Flat, matrix: Matrix, c_GR: list[list[float]], rows: Sequence[int], groups: Groups) -> None:
    """Add R rows one after the other, in float32 or wider, to columns that stay in the cache."""
    weights_D, mean_D = flat.weights_D, matrix.mean_D
    total = torch.empty(INLINE, dtype=torch.promote_types(weights_D.dtype, torch.float32))
    group_runs = runs(flat.slots, groups, len(weights_D))
    for block_RC, part in matrix.row_blocks(rows):
        rows_RC = list(block_RC)
        for start, stop, g in _within(group_runs, part):
            for first in range(start, stop, INLINE):
                last = min(first + INLINE, stop)
                total_C = total[: last - first]
                total_C.zero_() if mean_D is None else total_C.copy_(mean_D[first:last])
                for row_C, c in zip(rows_RC, c_GR[g], strict=True):
                    if c:
                        total_C.add_(row_C[first - part.start : last - part.start], alpha=c)
                weights_D[first:last] = total_C


def dot(flat: Flat, matrix: Matrix, total_GN: Tensor, groups: Groups) -> None:
    """Add [G, N], ⟨w_i, ∂ℓ/∂w⟩ per group, to ``total_GN``."""
    if matrix.products is not None:
        for start, stop, g in runs(flat.slots, groups, len(flat.gradient_Q)):
            total_GN[g] += matrix.products.dot(flat.gradient_Q, start, stop)
        return
    for run_NC, part, g in column_runs(flat, matrix, groups, len(flat.gradient_Q)):
        gradient_C = flat.gradient_Q[part].to(run_NC)
        total_GN[g] += run_NC.mv(gradient_C)
        if matrix.mean_D is not None:
            total_GN[g] += matrix.mean_D[part].to(run_NC).dot(gradient_C)


def column_runs(flat: Flat, matrix: Matrix, groups: Groups, stop: int) -> Iterator[tuple[Tensor, slice, int]]:
    """Yield ([N, C], columns, group): the columns before ``stop``, split into runs of one coefficient group each."""
    group_runs = runs(flat.slots, groups, stop)
    for piece_NC, part in matrix.column_blocks(0, stop):
        for begin, end, g in _within(group_runs, part):
            yield piece_NC[:, begin - part.start : end - part.start], slice(begin, end), g


def _within(group_runs: Sequence[tuple[int, int, int]], part: slice) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, group) of the runs, as far as they are in some columns."""
    for begin, end, g in group_runs[bisect_right(group_runs, part.start, key=lambda run: run[1]) :]:
        if begin >= part.stop:
            break
        yield max(begin, part.start), min(end, part.stop), g
