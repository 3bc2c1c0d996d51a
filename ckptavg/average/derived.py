"""The average with the vectors of spectral norm recomputed from the averaged weights."""

from collections.abc import Callable, Iterator, Mapping, MutableSet, Sequence

import torch
from torch import Tensor

from ckptavg.average.spectral_norm import as_matrix, leading
from ckptavg.average.weighted_sum import AddedNoise, Part, Ranges, rounded_to_odd, weighted_average
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.derived import SpectralNorm
from ckptavg.checkpoints.dtypes import TORCH
from ckptavg.checkpoints.integrity import same_bytes
from ckptavg.checkpoints.kept import values
from ckptavg.coefficients import Coefficients
from ckptavg.readers import StoredTensor


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

    def weight(name: str) -> Tensor:
        whole = {name: range(specs[name].numel)}
        data = bytearray(specs[name].nbytes)
        parts = weighted_average(checkpoints, coefficients, specs, only=whole, copied=copied, noise=noise)
        for _, offset, part in parts:
            data[offset : offset + len(part)] = part
        return torch.frombuffer(data, dtype=TORCH[specs[name].dtype]).view(specs[name].shape)

    mine = [layer for layer in recomputed if ranges.get(layer.u) or ranges.get(layer.v)]
    for layer, *pair in singular_vectors(mine, checkpoints, coefficients, weight):
        for name, vector in zip((layer.u, layer.v), pair, strict=True):
            dtype, elements = TORCH[specs[name].dtype], ranges.get(name)
            if elements:
                vector = vector.double()[elements.start : elements.stop]
                data = bytearray(len(vector) * dtype.itemsize)
                written = torch.frombuffer(data, dtype=dtype)
                written.copy_(vector if dtype.itemsize > 2 else rounded_to_odd(vector))
                yield Part(name, elements.start * dtype.itemsize, memoryview(data))


def singular_vectors(
    wanted: Sequence[SpectralNorm], checkpoints: Sequence[Checkpoint], coefficients: Coefficients,
    weight: Callable[[str], Tensor], eps: float = 0.0,
) -> Iterator[tuple[SpectralNorm, Tensor, Tensor]]:  # fmt: skip
    """Yield u and v of averaged weights, found from those of the last candidate that each is averaged from.

    Where all these candidates have one weight, bit for bit, and the same vectors, they are kept: of a frozen network
    too, the average of copies is the copy.

    Args:
        wanted: some of the `layers`.
        checkpoints: all candidates.
        coefficients: the coefficients of the average.
        weight: returns an averaged weight, on any device.
        eps: see `ckptavg.average.spectral_norm.leading`.
    """
    for layer in wanted:
        chosen = [checkpoint for checkpoint, c in zip(checkpoints, coefficients.row(layer.weight), strict=True) if c]
        if layer.weight in checkpoints[0].kept:
            chosen = [checkpoints[coefficients.selected[-1]]]
        u, v = values(chosen[-1], layer.u), values(chosen[-1], layer.v)
        if not all(same_bytes(chosen, name) for name in (layer.u, layer.v, layer.weight)):
            matrix = as_matrix(weight(layer.weight), layer.dim)
            u, v = leading(matrix, u.to(matrix.device), v.to(matrix.device), eps)
        yield layer, u, v
