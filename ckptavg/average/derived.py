"""The average with the vectors of spectral norm recomputed from the averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableSet, Sequence
from typing import TYPE_CHECKING

from ckptavg.average.runs import Ranges
from ckptavg.average.weighted_sum import AddedNoise, Part, weighted_average
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.derived import SpectralNorm
from ckptavg.checkpoints.numbers import round_into
from ckptavg.coefficients import Coefficients
from ckptavg.readers import ITEM_SIZE, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor


def layers(checkpoint: Checkpoint) -> Sequence[SpectralNorm]:
    """Return the weights whose vectors are recomputed."""
    return checkpoint.derived.spectral if checkpoint.derived else ()


def average(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, specs: Mapping[str, StoredTensor], *,
    only: Ranges | None = None, copied: MutableSet[str] | None = None, noise: AddedNoise | None = None,
) -> Iterator[Part]:  # fmt: skip
    """Yield the bytes of `weighted_average`, and the vectors of spectral norm for the average as it is written.

    Memory: the largest weight that has such vectors, once more. Ranks that share the work each read the weights of the
    vectors that they write.
    """
    recomputed = layers(checkpoints[0]) if len(coefficients.selected) > 1 else ()
    ranges = {name: range(spec.numel) for name, spec in specs.items()} if only is None else only
    vectors = {name for layer in recomputed for name in (layer.u, layer.v)}
    rest = {name: elements for name, elements in ranges.items() if name not in vectors}
    yield from weighted_average(checkpoints, coefficients, specs, only=rest, copied=copied, noise=noise)

    mine = [layer for layer in recomputed if ranges.get(layer.u) or ranges.get(layer.v)]
    if not mine:
        return
    from ckptavg.average.spectral_norm import singular_vectors, tensor

    def weight(name: str) -> Tensor:
        whole = {name: range(specs[name].numel)}
        data = bytearray(specs[name].nbytes)
        parts = weighted_average(checkpoints, coefficients, specs, only=whole, copied=copied, noise=noise)
        for _, offset, part in parts:
            data[offset : offset + len(part)] = part
        return tensor(data, specs[name])

    for layer, *pair in singular_vectors(mine, checkpoints, coefficients, weight):
        for name, vector in zip((layer.u, layer.v), pair, strict=True):
            dtype, elements = specs[name].dtype, ranges.get(name)
            if elements:
                numbers_C = vector.double()[elements.start : elements.stop].numpy()
                data = bytearray(len(numbers_C) * ITEM_SIZE[dtype])
                round_into(data, dtype, numbers_C)
                yield Part(name, elements.start * ITEM_SIZE[dtype], memoryview(data))
