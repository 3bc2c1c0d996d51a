"""Quantized candidates: differences from their mean, rounded to one affine grid per group.

Shape suffixes: N = candidates, D = elements of one dtype (padded to P·F here), P = words per row, F = codes per word,
K = elements per group, H = groups.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from ckptavg.candidates.products import kernels

# rounds of fitting the grid; from 8 bits on, fitting does not improve on the group's minimum and maximum
_ROUNDS: Final = {1: 8, 2: 8, 4: 4, 8: 0, 16: 0}
_ENCODED: Final = 1 << 18  # elements of a row encoded at a time, which fit a CPU's cache
_DECODED: Final = {"cpu": 1 << 21, "cuda": 1 << 27}  # elements decoded at a time: fits a CPU's cache, occupies a GPU


class Packed:
    """w_i ≈ w̄ + d̂_i with d̂ = zero + scale·code, with one `scale` and `zero` per candidate and group of K elements.

    Codes have 1, 2, 4, 8 or 16 bits and are packed without gaps: at 4 bits and K = 128 the matrix takes
    0.5 + 8/128 = 0.5625 bytes per element and candidate, and w̄ another 4/N. The full [N, D] matrix is never decoded at
    once, only in pieces that stay in the cache.

    Field f of word p holds column f·P + p, so a run of columns is a run of words with a common shift.

    The grid of a group is fitted by least squares, alternating between rounding codes to the nearest level and
    regressing scale and zero on the codes. This is Lloyd's iteration for equally spaced levels; it clips outliers if
    that lowers the error. (The TWA authors use the minimum and maximum of a tensor over all candidates, and one byte
    per code regardless of the number of bits.)

    References:
        Lloyd 1982, Least squares quantization in PCM; low-bit projection matrices for TWA: arXiv:2205.13104v3.
    """

    def __init__(self, n: int, example_D: Tensor, *, bits: int, group: int) -> None:
        self._bits = bits
        self._group = group
        self._fields = max(1, 8 // bits)
        self._columns = -(-len(example_D) // (group * self._fields)) * group
        device, words = example_D.device, torch.int16 if bits == 16 else torch.uint8
        self._words_NP = torch.empty(n, self._columns, dtype=words, device=device)
        self._scale_NH = torch.empty(n, self._columns * self._fields // group, device=device)
        self._zero_NH = torch.empty_like(self._scale_NH)
        self._mean_D = torch.zeros_like(example_D, dtype=torch.promote_types(example_D.dtype, torch.float32))
        self.mean_D: Tensor | None = self._mean_D
        self.nbytes = self._words_NP.nbytes + self._scale_NH.nbytes + self._zero_NH.nbytes
        self.squared_errors = torch.zeros(2, device=device)
        self._workspace: tuple[Tensor, Tensor] | None = None
        on_gpu = kernels(device)
        parts = self._words_NP, self._scale_NH, self._zero_NH, self._mean_D
        self.products = on_gpu and on_gpu.Packed(*parts, bits=bits, group=group)

    def encode(self, i: int, row_D: Tensor) -> None:
        """See `Matrix.encode`; the difference from the mean is encoded."""
        words_P = self._words_NP[i].zero_()
        scale_FH, zero_FH = self._scale_NH[i].view(self._fields, -1), self._zero_NH[i].view(self._fields, -1)
        step = max(1, _ENCODED // self._group) * self._group
        for f in range(self._fields):
            for start in range(0, self._columns, step):
                stop = min(start + step, self._columns)
                groups = slice(start // self._group, stop // self._group)
                columns = slice(f * self._columns + start, f * self._columns + stop)
                d = (row_D[columns] - self._mean_D[columns]).to(torch.float32)
                d_HK = nn.functional.pad(d, (0, stop - start - len(d))).view(-1, self._group)
                codes_HK, scale_FH[f, groups], zero_FH[f, groups] = fit(d_HK, 2**self._bits, _ROUNDS[self._bits])
                decoded_HK = torch.addcmul(zero_FH[f, groups].unsqueeze(1), codes_HK, scale_FH[f, groups].unsqueeze(1))
                error = decoded_HK.flatten()[: len(d)] - d  # without padding
                self.squared_errors += torch.stack([error.square().sum(), d_HK.square().sum()])
                offset = 2**15 if self._bits == 16 else 0  # int16 holds codes from -2¹⁵ on
                words_P[start:stop] |= (codes_HK.flatten() - offset).to(words_P.dtype) << (self._bits * f)
        if self._bits == 16:
            zero_FH += scale_FH * 2**15

    def row_blocks(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, slice]]:
        """See `Matrix.row_blocks`; decoded as by `column_blocks`."""
        yield from self.column_blocks(0, len(self._mean_D), rows)

    def column_blocks(self, start: int, stop: int, rows: Sequence[int] | None = None) -> Iterator[tuple[Tensor, slice]]:
        """See `Matrix.column_blocks`; yields differences from the mean, decoded to float32 in one workspace."""
        n = len(self._words_NP) if rows is None else len(rows)
        at_R = None if rows is None else torch.tensor(rows, dtype=torch.long, device=self._words_NP.device)

        def chosen(matrix: Tensor, columns: slice) -> Tensor:
            return matrix[:, columns] if at_R is None else matrix[:, columns].index_select(0, at_R)

        limit = _DECODED["cpu" if self._words_NP.device.type == "cpu" else "cuda"]
        step = max(1, limit // max(1, n) // self._group) * self._group
        width = min(step, self._columns)
        if self._workspace is None or len(self._workspace[0]) < n * width:
            self._workspace = self._scale_NH.new_empty(n * width), self._words_NP.new_empty(n * width)
        while start < stop:
            f, first = divmod(start, self._columns)
            begin, offset = first // self._group, f * self._columns // self._group  # groups
            last = min(begin * self._group + step, self._columns, stop - f * self._columns)
            end = -(-last // self._group)
            columns, groups = slice(begin * self._group, end * self._group), slice(offset + begin, offset + end)
            packed = chosen(self._words_NP, columns)
            values, words = (buffer[: packed.numel()].view_as(packed) for buffer in self._workspace)
            if self._fields > 1:
                packed = torch.bitwise_right_shift(packed, self._bits * f, out=words)
                if f < self._fields - 1:
                    packed.bitwise_and_(2**self._bits - 1)
            by_group = values.copy_(packed).view(n, -1, self._group)
            by_group.mul_(chosen(self._scale_NH, groups).unsqueeze(2)).add_(chosen(self._zero_NH, groups).unsqueeze(2))
            yield values[:, first - columns.start : last - columns.start], slice(start, start + last - first)
            start += last - first


def fit(d_HK: Tensor, levels: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fit codes in 0 … levels − 1, scale and zero of each group so that zero + scale·code ≈ d.

    Starts from the group's minimum and maximum. A round regresses d on the codes and then recomputes the codes; the
    squared error never increases. A group of equal values is represented exactly.

    Args:
        d_HK: [H, K], H groups of K values.
    Returns:
        codes [H, K] as floats, scale [H] > 0, zero [H].
    """
    tiny = torch.finfo(d_HK.dtype).tiny
    low, high = d_HK.amin(dim=1), d_HK.amax(dim=1)
    scale, zero = ((high - low) / (levels - 1)).clamp(min=tiny), low

    def codes() -> Tensor:
        return ((d_HK - zero.unsqueeze(1)) / scale.unsqueeze(1)).round_().clamp_(0, levels - 1)

    q_HK = codes()
    mean_H = d_HK.mean(dim=1)
    for _ in range(rounds):
        q_H = q_HK.mean(dim=1)
        off_HK = q_HK - q_H.unsqueeze(1)
        spread_H = off_HK.square().sum(dim=1)
        slope_H = (off_HK * d_HK).sum(dim=1) / spread_H
        scale = torch.where(spread_H > 0, slope_H, scale).clamp(min=tiny)
        zero = mean_H - scale * q_H
        q_HK = codes()
    return q_HK, scale, zero
