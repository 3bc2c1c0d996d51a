"""Exact weighted average, streamed from the checkpoint files in chunks.

Shape suffixes: N = candidates.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableSet, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptavg.average.runs import Ranges, Run, batches, joined
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import NAMES, common, dtype_name
from ckptavg.checkpoints.integrity import is_shared, refusal
from ckptavg.checkpoints.kept import is_averaged
from ckptavg.checkpoints.numbers import is_finite, round_into, widened
from ckptavg.coefficients import Coefficients
from ckptavg.errors import InputError
from ckptavg.readers import FLOATING, ITEM_SIZE, StoredTensor
from ckptavg.runtime.threads import count

CHUNK: Final = 1 << 18  # elements: fastest of 2¹⁶ to 2¹⁹ in scripts/benchmark's reference case
AddedNoise: TypeAlias = Callable[[str, int, int], NDArray[np.float64] | None]  # of (name, start, count)


class Part(NamedTuple):
    """Finished bytes of tensor ``name`` from byte ``offset``; ``data`` is valid until the next part is requested."""

    name: str
    offset: int
    data: memoryview


@dataclass(frozen=True, kw_only=True)
class PlannedOutput:
    """Content of the output."""

    specs: Mapping[str, StoredTensor]  # name → dtype and shape
    parts: Iterator[Part] = field(repr=False)  # the bytes of all tensors; can be iterated once
    config: Mapping[str, Any] | None = None  # the adapter_config.json of an exact adapter
    lost: float = 0.0  # ‖ΔW − truncated ΔW‖ / ‖ΔW‖ of an exact adapter, Frobenius norms over all modules
    notes: Sequence[str] = ()  # messages for the user
    factor_error: float | None = None  # see `ckptavg.average.lora.factor_error`; None if nothing exact can be written
    not_averaged: Sequence[str] = ()  # names of the tensors copied from the last selected candidate
    derived: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])  # see `Derived.kinds`
    copied: MutableSet[str] = field(default_factory=set[str])  # filled by ``parts``; see `weighted_average`


def output_specs(checkpoints: Sequence[Checkpoint], dtype: str | None = None) -> dict[str, StoredTensor]:
    """Return name → dtype and shape of the average: those of the candidates; ``dtype`` overrides floating-point ones.

    Without ``dtype``, one that holds the values of all candidates is taken where theirs differ. Complex tensors become
    complex64 by any ``dtype`` but float64, which keeps them: there are no narrower ones.

    Raises:
        InputError: if a tensor's dtype cannot be averaged (float8).
    """
    override = None if dtype is None else NAMES[dtype]
    specs: dict[str, StoredTensor] = {}
    for name in checkpoints[0].names:
        spec = checkpoints[0].spec(name)
        if spec.dtype not in NAMES.values():
            message = f"dtype {spec.dtype} cannot be averaged; convert it to one of {', '.join(FLOATING)} first"
            hint = f"in each checkpoint, state[{name!r}] = state[{name!r}].to(torch.bfloat16)"
            raise InputError(message, path=checkpoints[0].path, tensor=name, hint=hint)
        own = common(checkpoint.spec(name).dtype for checkpoint in checkpoints)
        target = override if override and own in FLOATING else own
        if spec.is_complex and target != own:
            target = "F32"
        specs[name] = replace(spec, dtype=target, record="", offset=0, stride=None)
    return specs


def not_averaged(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors copied from the last selected candidate, kept ones first."""
    copied = [name for name in checkpoint.names if not is_averaged(checkpoint, name)]
    return sorted(copied, key=lambda name: name not in checkpoint.kept)


def weighted_average(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, specs: Mapping[str, StoredTensor], *,
    only: Ranges | None = None, chunk: int = CHUNK, threads: int | None = None, copied: MutableSet[str] | None = None,
    noise: AddedNoise | None = None,
) -> Iterator[Part]:  # fmt: skip
    """Yield all bytes of Σ_i c_i w_i, tensor by tensor in the order of the first file.

    Each product and each sum is one float64 operation, in the order of the candidates, and the total is rounded once
    to the output's dtype: within half a unit in the last place of the exact sum, plus N·2⁻⁵³·Σ|c_i w_i| (and N·2⁻¹⁰⁷⁵
    where float64 itself underflows), and bit-identical for every ``chunk`` and ``threads``. If all coefficients are
    equal, c Σ_i w_i is computed with one product (except for float64 tensors, whose sum might overflow). Candidates
    with coefficient 0 are not read. A tensor for which only one candidate is selected, with coefficient 1, is copied
    bit for bit; non-floating-point and `Checkpoint.kept` tensors are copied from the last selected candidate.

    A tensor that is bit-equal in all selected candidates is reproduced bit for bit, unless the coefficients are
    `Coefficients.linear`, whose sum it is multiplied by as any other. The rounding does this where the
    dtype is kept and no coefficient is negative (−0.0): it is below half a unit in the last place. Only for float64,
    narrower outputs, negative coefficients and results that are not finite are the tensors compared.

    Memory: 40 bytes per element of ``chunk`` for each thread and one more, regardless of number and size of candidates.

    Args:
        checkpoints: N open candidates with equal names and shapes; only floating-point dtypes may differ.
        specs: the output's specs, from `output_specs`.
        only: the elements to average; None means all.
        chunk: elements per chunk.
        threads: number of chunks read and summed in parallel; by default those of `ckptavg.runtime.threads.count`.
        copied: gets the names of copied tensors that are not finite.
        noise: returns what is added to the elements of a tensor before they are rounded, or None.
    Raises:
        InputError: naming file and tensor, if a result is NaN or infinite and the candidates do not allow that, unless
            the tensor is kept or `is_shared` by all candidates.
    """
    threads = threads or count()
    divided = batches(checkpoints, coefficients, specs, only, chunk)
    divided = divided if noise else map(joined, divided)
    copied = set[str]() if copied is None else copied
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[list[Part]]] = deque()
        # buffers are reused once the caller has finished with their parts
        buffers = cycle([_Sums(chunk, checkpoints, copied, noise) for _ in range(threads + 1)])
        for batch, sums in zip(divided, buffers, strict=False):  # buffers never end
            if len(pending) > threads:
                yield from pending.popleft().result()
            pending.append(pool.submit(sums.parts, batch))
        while pending:
            yield from pending.popleft().result()


class _Sums:
    """Working buffers of one thread, allocated once."""

    def __init__(
        self, chunk: int, checkpoints: Sequence[Checkpoint], copied: MutableSet[str], noise: AddedNoise | None
    ) -> None:
        self._checkpoints = checkpoints
        self._copied = copied
        self._noise = noise
        self._total, self._term = np.empty((2, chunk))
        self._room = np.empty(2 * chunk, np.uint32)  # numbers of 16 bits, widened; scratch of their rounding
        self._input, self._output = (memoryview(bytearray(8 * chunk)) for _ in range(2))

    def parts(self, batch: Sequence[Run]) -> list[Part]:
        """Average a batch of runs of at most one chunk in total, and return their bytes."""
        parts: list[Part] = []
        free = self._output
        for run in batch:
            size = ITEM_SIZE[run.target]
            data, free = free[: run.numel * size], free[run.numel * 8 :]
            self._fill(run, data)
            parts += [Part(each.name, each.start * size, piece) for each, piece in run.split(data)]
        return parts

    def _fill(self, run: Run, data: memoryview) -> None:
        """Average a run into ``data``."""
        source = run.terms[0][1]
        added = None if self._noise is None else self._noise(run.name, run.start, run.numel)
        whole = added is None and [c for c, _ in run.terms] == [1.0]
        copied = whole and run.target == source.spec(run.name).dtype
        if copied:
            source.read_into(run.name, run.start, data)
        if run.target in FLOATING:
            if not copied:
                self._add(run, data, added)
            if is_finite(data, run.target, self._room):
                return
            if run.following:
                for each, piece in run.split(data):
                    self._fill(each, piece)
            else:
                self._copy(run, data)  # only then are candidates read again

    def _copy(self, run: Run, data: memoryview) -> None:
        """Copy a run that is not finite if it is kept or shared; raise its error if it is not allowed either."""
        sources = [source for _, source in run.terms]
        allowed, known = sources[0].allow_nonfinite, run.name in sources[0].kept or run.name in self._copied
        if known or is_shared(sources if allowed else self._checkpoints, run.name):
            self._add(run._replace(terms=[(1.0, sources[-1])]), data)
            finite_C = np.isfinite(widened(data, run.target))
            if not np.array_equal(finite_C, np.isfinite(self._total[: run.numel])):
                raise overflow_error(sources[-1], run.name, run.target)
            if run.target == sources[-1].spec(run.name).dtype:  # a conversion changes the bits of NaN
                sources[-1].read_into(run.name, run.start, data)
            self._copied.add(run.name)
        elif not allowed:
            raise refusal(sources, self._checkpoints, run.name) or overflow_error(sources[-1], run.name, run.target)

    def _add(self, run: Run, data: memoryview, added: NDArray[np.float64] | None = None) -> None:
        """Compute Σ_i c_i w_i, and what is added to it, over a run of elements and round it once into ``data``."""
        total, term, single = self._total[: run.numel], self._term[: run.numel], self._room.view(np.float32)
        dtypes, c_0 = [source.spec(run.name).dtype for _, source in run.terms], run.terms[0][0]
        equal = all(c == c_0 for c, _ in run.terms) and "F64" not in dtypes
        with np.errstate(all="ignore"):  # what is not finite is found in the result
            for i, ((c, source), dtype) in enumerate(zip(run.terms, dtypes, strict=True)):
                bytes_read = self._input[: run.numel * ITEM_SIZE[dtype]]
                source.read_into(run.name, run.start, bytes_read)
                addend = widened(bytes_read, dtype, single)
                # multiply and add separately: with a fused operation, bits would depend on where the chunk ends
                if not equal:
                    addend = np.multiply(addend, c, out=term if i else total, dtype=np.float64)
                if i > 0:
                    np.add(total, addend, out=total)
                elif equal:
                    np.copyto(total, addend)
            if equal:
                total *= c_0
            if added is not None:
                total += added
            round_into(data, run.target, total, self._room)


def overflow_error(checkpoint: Checkpoint, name: str, dtype: str) -> InputError:
    """Return the error for an average of finite values that ``dtype`` cannot represent."""
    message, hint = f"the average overflows {dtype_name(dtype)}", "write it with --dtype bfloat16 or float32"
    return InputError(message, path=checkpoint.path, tensor=name, hint=hint)
