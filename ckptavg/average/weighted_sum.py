"""The exact weighted average, read from the original files chunk by chunk.

Shape suffixes: N = candidates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import FLOATING, NAMES, TORCH
from ckptavg.checkpoints.integrity import is_finite, not_finite
from ckptavg.coefficients import Coefficients
from ckptavg.errors import InputError
from ckptavg.readers import ITEM_SIZE, StoredTensor
from ckptavg.runtime.threads import processors

CHUNK: Final = 1 << 18  # elements: of 2¹⁶ to 2¹⁹ the least processor time in scripts/benchmark's reference case
_CUT: Final = (1 << 39) - 1  # the bits of a float64 after the first 14 of its significand


Ranges: TypeAlias = Mapping[str, range]
"""Name → numbers of elements in C order; of other tensors none."""


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


class _Run(NamedTuple):
    """Elements of one tensor that are averaged at once."""

    name: str
    start: int
    numel: int
    terms: Sequence[tuple[float, Checkpoint]]
    target: str


def weighted_average(
    checkpoints: Sequence[Checkpoint],
    coefficients: Coefficients,
    specs: Mapping[str, StoredTensor],
    *,
    only: Ranges | None = None,
    chunk: int = CHUNK,
    threads: int | None = None,
) -> Iterator[Part]:
    """Every byte of Σ_i c_i w_i, tensor by tensor in the order of the first file.

    Each product and each sum is one float64 operation, in the order of the candidates, and the total is rounded once
    to the output's dtype: within half a unit in the last place of the exact sum, plus N·2⁻⁵³·Σ|c_i w_i| (and N·2⁻¹⁰⁷⁵
    where float64 itself underflows), and the same bits for every ``chunk`` and ``threads``. Where all coefficients are
    equal it is c Σ_i w_i, with one product (not of float64 tensors, whose sum might overflow). Candidates with
    coefficient 0 are not read. A tensor of which one candidate has coefficient 1 is copied bit for bit, and so, from
    the last selected candidate, is one that is not floating point.

    Memory: 32 bytes an element of ``chunk`` for each thread and one more, whatever the candidates' number and size.

    Args:
        checkpoints: N open candidates with equal names, shapes and dtypes.
        coefficients: their coefficients.
        specs: what `output_specs` gave.
        only: the elements that are wanted; None is all of them.
        chunk: elements at once.
        threads: how many chunks are read and summed at a time; by default as many as torch uses, or the processors
            where these are fewer.
    Raises:
        InputError: naming file and tensor, if a result is NaN or infinite and the candidates may not be.
    """
    before = torch.get_num_threads()
    threads = threads or min(before, processors())
    batches = _batches(_runs(checkpoints, coefficients, specs, only, chunk), chunk)
    torch.set_num_threads(1)  # a chunk is too small to share: measured 3 × slower with 2 threads on a busy machine
    try:
        with ThreadPoolExecutor(threads) as pool:
            pending: deque[Future[list[Part]]] = deque()
            # the batch after next gets the buffers of the one that the caller is done with
            for batch, buffers in zip(batches, cycle([_Sums(chunk) for _ in range(threads + 1)])):
                if len(pending) > threads:
                    yield from pending.popleft().result()
                pending.append(pool.submit(buffers.parts, batch))
            while pending:
                yield from pending.popleft().result()
    finally:
        torch.set_num_threads(before)


def part(checkpoint: Checkpoint, rank: int, world: int) -> Ranges:
    """The elements that are one worker's to average: a ``world``-th of the bytes, in the order they are read in."""
    names = _in_order(checkpoint)
    total = sum(checkpoint.spec(name).nbytes for name in names)
    start, stop = total * rank // world, total * (rank + 1) // world
    ranges: dict[str, range] = {}
    for name in names:
        spec = checkpoint.spec(name)
        begin, end = (min(max(0, edge // ITEM_SIZE[spec.dtype]), spec.numel) for edge in (start, stop))
        if begin < end:
            ranges[name] = range(begin, end)
        start, stop = start - spec.nbytes, stop - spec.nbytes
    return ranges


def _in_order(checkpoint: Checkpoint) -> list[str]:
    """The tensors as they lie in the file."""
    specs = checkpoint.tensors
    return sorted(specs, key=lambda name: (specs[name].record, specs[name].offset, name))


def _runs(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, specs: Mapping[str, StoredTensor],
    only: Ranges | None, chunk: int,
) -> Iterator[_Run]:  # fmt: skip
    first = checkpoints[0]
    for name in _in_order(first):
        spec = first.spec(name)
        wanted = range(spec.numel) if only is None else only.get(name, range(0))
        if spec.dtype in FLOATING:
            terms = [(c, checkpoints[i]) for i, c in enumerate(coefficients.row(name)) if c != 0]
        else:
            terms = [(1.0, checkpoints[coefficients.selected[-1]])]
        for start in range(wanted.start, wanted.stop, chunk):
            yield _Run(name, start, min(chunk, wanted.stop - start), terms, specs[name].dtype)


def _batches(runs: Iterable[_Run], chunk: int) -> Iterator[list[_Run]]:
    """Runs that fit into one chunk together: small tensors are not worth a thread's while on their own."""
    batch: list[_Run] = []
    numel = 0
    for run in runs:
        if numel + run.numel > chunk:
            yield batch
            batch, numel = [], 0
        batch.append(run)
        numel += run.numel
    if batch:
        yield batch


class _Sums:
    """The working set of one thread: every buffer there is, made once."""

    def __init__(self, chunk: int) -> None:
        self._total = torch.empty(chunk, dtype=torch.float64)
        self._term = torch.empty(chunk, dtype=torch.float64)
        self._input = bytearray(8 * chunk)
        self._output = memoryview(bytearray(8 * chunk))

    def parts(self, batch: Sequence[_Run]) -> list[Part]:
        """The finished bytes of some runs, at most a chunk of elements together."""
        parts: list[Part] = []
        free = self._output
        for run in batch:
            size = ITEM_SIZE[run.target]
            data, free = free[: run.numel * size], free[run.numel * 8 :]
            source = run.terms[0][1]
            copied = run.target == source.spec(run.name).dtype and [c for c, _ in run.terms] == [1.0]
            if copied:
                source.read_into(run.name, run.start, data)
            if run.target in FLOATING:
                result = torch.frombuffer(data, dtype=TORCH[run.target])
                if not copied:
                    self._add(run, result)
                self._check_finite(run, result)
            parts.append(Part(run.name, run.start * size, data))
        return parts

    def _add(self, run: _Run, result: Tensor) -> None:
        """Σ_i c_i w_i over a run of elements, rounded once into ``result``."""
        total, term = self._total[: run.numel], self._term[: run.numel]
        c_0, source = run.terms[0]
        equal = all(c == c_0 for c, _ in run.terms) and source.spec(run.name).dtype != "F64"
        for i, (c, source) in enumerate(run.terms):
            addend = (total if i == 0 else term).copy_(self._read(source, run))
            # multiplied and added, each on its own: a fused operation would make bits depend on the chunk's end
            if not equal:
                addend.mul_(c)
            if i > 0:
                total.add_(addend)
        if equal:
            total.mul_(c_0)
        result.copy_(total if result.itemsize > 2 else rounded_to_odd(total, out=term))

    def _check_finite(self, run: _Run, result: Tensor) -> None:
        """Name the candidate that spoilt ``result``; looked for only when something did."""
        if run.terms[0][1].allow_nonfinite or is_finite(result):
            return
        for _, source in run.terms:
            if error := not_finite(source, run.name):
                raise error
        raise InputError(
            f"the average overflows {str(result.dtype).removeprefix('torch.')}",
            path=run.terms[-1][1].path,
            tensor=run.name,
            hint="write it with --dtype bfloat16 or float32",
        )

    def _read(self, source: Checkpoint, run: _Run) -> Tensor:
        dtype = source.spec(run.name).dtype
        source.read_into(run.name, run.start, memoryview(self._input)[: run.numel * ITEM_SIZE[dtype]])
        return torch.frombuffer(self._input, dtype=TORCH[dtype], count=run.numel)


def rounded_to_odd(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``x`` (float64) with 14 significant bits, such that rounding on to 16-bit formats gives what one rounding would.

    torch converts float64 to bfloat16 and float16 through float32, which rounds twice. Truncated towards zero, with
    the last bit set where anything was cut off, a number lies on the same side of every 16-bit midpoint as before,
    because 14 bits are at least two more than either format has; and float32 holds it exactly down to 2⁻¹³⁶, a quarter
    of bfloat16's least number, so only the last rounding rounds.

    References:
        Boldo and Melquiond 2008, Emulation of FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd.
    """
    bits = x.view(torch.int64)
    odd = torch.bitwise_and(bits, _CUT, out=None if out is None else out.view(torch.int64))
    odd.add_(_CUT).bitwise_or_(bits).bitwise_and_(~_CUT)  # the sum carries into the 14th bit unless all it cuts are 0
    return odd.view(torch.float64)
