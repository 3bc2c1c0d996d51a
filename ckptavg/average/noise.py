"""Noise for draws around the mean of the candidates: standard deviations, and counter-based random numbers.

Shape suffixes: N = candidates, C = consecutive elements of a tensor.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptavg.checkpoints.checkpoint import Checkpoint, chunks
from ckptavg.checkpoints.integrity import same_bytes
from ckptavg.checkpoints.kept import is_averaged
from ckptavg.checkpoints.numbers import numbers
from ckptavg.readers import ITEM_SIZE, StoredTensor

Deviation: TypeAlias = Callable[[str, int, int], NDArray[np.float32]]
"""Returns [C], the standard deviations of the elements of a tensor from an index on: ``(name, start, C)``."""

_MOST: Final = 1 << 30  # bytes of standard deviations that are kept in memory
_HEAD: Final = 4096  # bytes by which tensors are told apart before they are compared whole
_STATISTICS: Final = ("running_mean", "running_var")


def not_drawn(checkpoint: Checkpoint, buffers: Collection[str] = ()) -> list[str]:
    """Return the averaged tensors that are no parameters: BatchNorm's statistics, and ``buffers`` of the model."""
    averaged = (name for name in checkpoint.names if is_averaged(checkpoint, name))
    return [name for name in averaged if name in buffers or name.rpartition(".")[2] in _STATISTICS]


def drawn_names(checkpoints: Sequence[Checkpoint], means: Collection[str]) -> dict[str, str]:
    """Return the averaged tensors but ``means``, each with the name that its noise is drawn under.

    Frozen tensors, bit-equal in all candidates, are left out. Tied tensors have one noise: names that share memory, and
    copies that are equal in the first candidate and the last.
    """
    first, last = checkpoints[0], checkpoints[-1]
    shared: dict[StoredTensor, str] = {}
    alike: dict[Any, list[str]] = {}
    result: dict[str, str] = {}
    for name in (name for name in first.names if is_averaged(first, name) and name not in means):
        if same_bytes(checkpoints, name):
            continue
        if (spec := first.spec(name)) in shared:
            result[name] = shared[spec]
            continue
        same = alike.setdefault((spec.dtype, spec.shape, _head(first, name), _head(last, name)), [])
        equal = (other for other in same if all(_equal(checkpoint, other, name) for checkpoint in (first, last)))
        result[name] = shared[spec] = next(equal, name)
        same.append(name)
    return result


def _head(checkpoint: Checkpoint, name: str) -> bytes:
    spec = checkpoint.spec(name)
    data = bytearray(min(spec.numel, _HEAD // ITEM_SIZE[spec.dtype]) * ITEM_SIZE[spec.dtype])
    checkpoint.read_into(name, 0, memoryview(data))
    return bytes(data)


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    contents = zip(
        *(chunks(checkpoint.spec(name), name, checkpoint.read_into) for name in (first, second)), strict=True
    )
    return all(ours == others for (_, ours), (_, others) in contents)


class Deviations:
    """σ of candidates in two passes of float64, rounded to float32: Σ_i (w_i − w̄)²/N of each element.

    E[w²] − w̄² would cancel: where |w|/σ is 1,000, float32 is 17 % off.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._kept: dict[tuple[str, int, int], tuple[NDArray[np.float32], tuple[float, float]]] = {}
        self._bytes = 0
        self._squares: list[tuple[float, float]] = []

    def __call__(self, name: str, start: int, count: int) -> NDArray[np.float32]:
        """See `Deviation`; up to a gibibyte is kept for the next draw."""
        key = (name, start, count)
        if (kept := self._kept.get(key)) is None:
            mean_C, wide_C = self.moments(name, start, count)
            kept = wide_C.astype(np.float32), (float(wide_C.dot(wide_C)), float(mean_C.dot(mean_C)))
            if self._bytes + kept[0].nbytes <= _MOST:
                self._bytes += kept[0].nbytes
                self._kept[key] = kept
        self._squares.append(kept[1])
        return kept[0]

    @property
    def squares(self) -> tuple[float, float]:
        """Σ σ² and Σ w̄² over the elements that were asked for, each as often as that."""
        return math.fsum(square for square, _ in self._squares), math.fsum(square for _, square in self._squares)

    def moments(self, name: str, start: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return w̄ and σ, [C] float64 each; 0 where the candidates are not finite."""
        n, (first, *others) = len(self._checkpoints), self._checkpoints
        first_C = _values(first, name, start, count)
        mean_C, square_C = np.zeros_like(first_C), np.zeros_like(first_C)
        with np.errstate(all="ignore"):  # masks of −inf
            for checkpoint in others:  # the mean of differences, which is exact for an element that never changes
                mean_C += _values(checkpoint, name, start, count) - first_C
            mean_C /= n
            mean_C += first_C
            for checkpoint in self._checkpoints:
                square_C += np.square(_values(checkpoint, name, start, count) - mean_C)
            square_C = np.sqrt(square_C / n)
        return np.nan_to_num(mean_C, posinf=0.0, neginf=0.0), np.nan_to_num(square_C, posinf=0.0)


def _values(checkpoint: Checkpoint, name: str, start: int, count: int) -> NDArray[np.float64]:
    dtype = checkpoint.spec(name).dtype
    data = bytearray(count * ITEM_SIZE[dtype])
    checkpoint.read_into(name, start, memoryview(data))
    return numbers(data, dtype)


def stream_key(seed: int, sample: int, name: str | None = None) -> int:
    """Return the key of the random numbers of a draw for a tensor, or without a name for the low-rank part."""
    text = f"{seed} {sample}" if name is None else f"{seed} {sample} {name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16])


def standard_normal(key: int, start: int, count: int) -> NDArray[np.float64]:
    """Return elements ``start`` to ``start + count`` of an endless sequence of standard normal numbers.

    Each is a function of the key and its index alone, so that bytes depend neither on the division of a tensor nor on
    order: Φ⁻¹((⌊u/2¹²⌋ + ½)/2⁵²) of the 64-bit numbers u of Philox, a counter-based generator whose output numpy
    guarantees not to change. The argument is exact, and neither 0 nor 1.

    References:
        Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3 (Philox 4×64-10).
    """
    from scipy.special import ndtri  # an average without draws does not load it

    generator = np.random.Philox(key=key)
    generator.advance(start // 4)  # a counter gives four numbers
    u_C = (generator.random_raw(start % 4 + count)[start % 4 :] >> np.uint64(12)).astype(np.float64)
    u_C += 0.5
    u_C *= 2**-52
    return ndtri(u_C)
