"""The exact weighted average, read from the original files chunk by chunk.

Shape suffixes: N = candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.dtypes import FLOATING, NAMES, TORCH
from ckptavg.errors import InputError
from ckptavg.readers import ITEM_SIZE, StoredTensor

CHUNK: Final = 1 << 18  # elements: the float64 accumulator and its addend, 4 MiB, stay in a core's cache


class Part(NamedTuple):
    """A run of finished bytes: of which tensor, from which byte of it on; valid until the next part is asked for."""

    name: str
    offset: int
    data: memoryview


def output_specs(checkpoint: Checkpoint, dtype: str | None = None) -> dict[str, StoredTensor]:
    """Name → dtype and shape of the average: the candidates' own, floating-point tensors in ``dtype`` if given.

    Raises:
        InputError: if a tensor's dtype cannot be averaged (float8, complex).
    """
    wanted = None if dtype is None else NAMES[dtype]
    specs: dict[str, StoredTensor] = {}
    for name in checkpoint.names:
        spec = checkpoint.spec(name)
        if spec.dtype not in TORCH:
            raise InputError(
                f"dtype {spec.dtype} cannot be averaged; convert it to one of {', '.join(FLOATING)} first",
                path=checkpoint.path,
                tensor=name,
            )
        specs[name] = StoredTensor(wanted if wanted and spec.dtype in FLOATING else spec.dtype, spec.shape, "", 0)
    return specs


def not_averaged(checkpoint: Checkpoint) -> list[str]:
    """The tensors that are not floating point: taken from the last selected candidate instead."""
    return [name for name in checkpoint.names if checkpoint.spec(name).dtype not in FLOATING]


def weighted_average(
    checkpoints: Sequence[Checkpoint],
    coefficients: Coefficients,
    specs: Mapping[str, StoredTensor],
    *,
    chunk: int = CHUNK,
) -> Iterator[Part]:
    """Every byte of Σ_i c_i w_i, tensor by tensor in the order of the first file.

    Each product and each sum is one float64 operation, in the order of the candidates, and the total is rounded once
    to the output's dtype: within half a unit in the last place of the exact sum, plus N·2⁻⁵³·Σ|c_i w_i| (and N·2⁻¹⁰⁷⁵
    where float64 itself underflows), and the same bits for every ``chunk``. Candidates with coefficient 0 are not
    read. A tensor of which one candidate has coefficient 1 is copied bit for bit, and so, from the last selected
    candidate, is one that is not floating point.

    Memory: 30 bytes an element of ``chunk``, whatever the number and size of the candidates.

    Args:
        checkpoints: N open candidates with equal names, shapes and dtypes.
        coefficients: their coefficients.
        specs: what `output_specs` gave.
        chunk: elements a part.
    Raises:
        InputError: naming file and tensor, if a result is NaN or infinite.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a chunk is too small to share: measured 3 × slower with 2 threads on a busy machine
    try:
        yield from _parts(checkpoints, coefficients, specs, chunk)
    finally:
        torch.set_num_threads(threads)


def _parts(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, specs: Mapping[str, StoredTensor], chunk: int
) -> Iterator[Part]:
    first = checkpoints[0]
    sums = _Sums(chunk)
    for name in sorted(first.names, key=lambda name: (first.spec(name).record, first.spec(name).offset, name)):
        spec, target = first.spec(name), specs[name]
        if spec.dtype in FLOATING:
            terms = [(c, checkpoints[i]) for i, c in enumerate(coefficients.row(name)) if c != 0]
        else:
            terms = [(1.0, checkpoints[coefficients.selected[-1]])]
        copied = target.dtype == spec.dtype and [c for c, _ in terms] == [1.0]
        for start in range(0, spec.numel, chunk):
            count = min(chunk, spec.numel - start)
            if copied:
                data = sums.copy(terms[0][1], name, start, count)
            else:
                data = sums.add(terms, name, start, count, TORCH[target.dtype])
            yield Part(name, start * ITEM_SIZE[target.dtype], data)


class _Sums:
    """The working set: every buffer there is, made once."""

    def __init__(self, chunk: int) -> None:
        self._total = torch.empty(chunk, dtype=torch.float64)
        self._term = torch.empty(chunk, dtype=torch.float64)
        self._input = bytearray(8 * chunk)
        self._output = bytearray(8 * chunk)

    def copy(self, source: Checkpoint, name: str, start: int, count: int) -> memoryview:
        """The elements of one candidate as they are."""
        spec = source.spec(name)
        view = memoryview(self._output)[: count * ITEM_SIZE[spec.dtype]]
        source.read_into(name, start, view)
        if spec.dtype in FLOATING:
            self._check_finite(_tensor(self._output, spec.dtype, count), [(1.0, source)], name, start)
        return view

    def add(
        self, terms: Sequence[tuple[float, Checkpoint]], name: str, start: int, count: int, dtype: torch.dtype
    ) -> memoryview:
        """Σ_i c_i w_i over a run of elements, rounded once to ``dtype``."""
        total, term = self._total[:count], self._term[:count]
        for i, (c, source) in enumerate(terms):
            stored = self._read(source, name, start, count)
            # copied, multiplied, added, each on its own: a fused operation would make bits depend on the chunk's end
            (total if i == 0 else term).copy_(stored).mul_(c)
            if i > 0:
                total.add_(term)
        result = torch.frombuffer(self._output, dtype=dtype, count=count)
        result.copy_(total if dtype in (torch.float64, torch.float32) else rounded_to_odd(total))
        self._check_finite(result, terms, name, start)
        return memoryview(self._output)[: count * dtype.itemsize]

    def _check_finite(self, result: Tensor, terms: Sequence[tuple[float, Checkpoint]], name: str, start: int) -> None:
        """Name the candidate that spoilt ``result``; looked for only when something did."""
        if result.isfinite().all():
            return
        for _, source in terms:
            stored = self._read(source, name, start, len(result))
            if bad := int((~stored.isfinite()).sum()):
                first = start + int((~stored.isfinite()).int().argmax())
                raise InputError(
                    f"{bad} values are NaN or infinite, the first at element {first}",
                    path=source.path,
                    tensor=name,
                    hint=f"leave it out with --exclude '{source.path.name}'",
                )
        raise InputError(
            f"the average overflows {str(result.dtype).removeprefix('torch.')}",
            path=terms[-1][1].path,
            tensor=name,
            hint="write it with --dtype bfloat16 or float32",
        )

    def _read(self, source: Checkpoint, name: str, start: int, count: int) -> Tensor:
        dtype = source.spec(name).dtype
        source.read_into(name, start, memoryview(self._input)[: count * ITEM_SIZE[dtype]])
        return _tensor(self._input, dtype, count)


def _tensor(buffer: bytearray, dtype: str, count: int) -> Tensor:
    return torch.frombuffer(buffer, dtype=TORCH[dtype], count=count)


def rounded_to_odd(x: Tensor) -> Tensor:
    """float64 → float32 such that rounding on to 16 bits gives what one rounding from float64 would.

    torch converts float64 to bfloat16 and float16 through float32, which rounds twice. Truncated towards zero, with
    the last bit set where anything was cut off, the float32 value lies on the same side of every 16-bit midpoint as
    the float64 value, because it has at least two more bits than the target.

    References:
        Boldo and Melquiond 2008, Emulation of FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd.
    """
    nearest = x.to(torch.float32)
    widened = nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    bits -= (widened.abs() > x.abs()).to(torch.int32)  # towards zero: magnitudes are ordered as their bits are
    bits |= (widened != x).to(torch.int32)
    return nearest
