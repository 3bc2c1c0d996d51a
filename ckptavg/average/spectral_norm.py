"""Leading singular vectors of a weight, as spectral norm stores them, in the same bits on every machine.

Shape suffixes: M, N = rows and columns of the weight as a matrix, K = vectors of a Krylov space.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.derived import SpectralNorm
from ckptavg.checkpoints.integrity import same_bytes
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.coefficients import Coefficients
from ckptavg.readers import StoredTensor

_BLOCK: Final = 1 << 18  # elements of the weight that are multiplied at once; 2 MB in float64
_KRYLOV: Final = 12  # vectors of a Krylov space
_CYCLES: Final = 200  # Krylov spaces: 2,400 products with the weight at most
_SQUARINGS: Final = 52  # the 2⁵²th power: eigenvalues are told apart to rounding
_NUDGE: Final = 1e-6


def singular_vectors(
    wanted: Sequence[SpectralNorm], checkpoints: Sequence[Checkpoint], coefficients: Coefficients,
    weight: Callable[[str], Tensor], eps: float = 0.0,
) -> Iterator[tuple[SpectralNorm, Tensor, Tensor]]:  # fmt: skip
    """Yield u and v of averaged weights, found from those of the last candidate that each is averaged from.

    Where all these candidates have one weight, bit for bit, and the same vectors, they are kept: of a frozen network
    too, the average of copies is the copy.

    Args:
        wanted: some of the layers of `ckptavg.average.derived.layers`.
        checkpoints: all candidates.
        coefficients: the coefficients of the average.
        weight: returns an averaged weight, on any device.
        eps: see `leading`.
    """
    for layer in wanted:
        chosen = [checkpoint for checkpoint, c in zip(checkpoints, coefficients.row(layer.weight), strict=True) if c]
        if layer.weight in checkpoints[0].kept:
            chosen = [checkpoints[coefficients.selected[-1]]]
        u, v = (whole(chosen[-1], name) for name in (layer.u, layer.v))
        if not all(same_bytes(chosen, name) for name in (layer.u, layer.v, layer.weight)):
            matrix = as_matrix(weight(layer.weight), layer.dim)
            u, v = leading(matrix, u.to(matrix.device), v.to(matrix.device), eps)
        yield layer, u, v


def tensor(data: bytearray, spec: StoredTensor) -> Tensor:
    """Return the tensor of ``data``, without a copy."""
    return torch.frombuffer(data, dtype=TORCH[spec.dtype]).view(spec.shape)


def whole(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read a tensor as a whole."""
    return tensor(checkpoint.read(name), checkpoint.spec(name))


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """Return the matrix whose spectral norm is taken: ``dim`` gives the rows, the other dimensions the columns."""
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)


def leading(weight_MN: Tensor, u_M: Tensor, v_N: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the singular vectors of the largest singular value, which power iteration from v reaches in the limit.

    Each cycle replaces v by the vector of the largest vᵀWᵀWv in the Krylov space {v, WᵀWv, …, (WᵀW)ᵏ⁻¹v}: as far as
    power iteration gets in K steps and farther, since the space has its result. It ends once ‖WᵀWv − σ²v‖ ≤ τσ², which
    bounds the relative error of σ² by τ, or after a fixed number of cycles if the largest values are closer than that
    can tell. If they are equal, v stays as close to the given one as their space allows. A small vector added at
    first keeps it from staying at a smaller singular value, whose own vector it may be.

    Sums are by halves, in elementwise operations: the bits depend neither on threads nor on the processor, as those of
    BLAS do. Arithmetic is float64 (float32 on mps). Of a weight that is zero or not finite the given vectors are
    returned.

    Args:
        weight_MN: the weight, of any floating-point dtype.
        u_M: returned if there is nothing to find.
        v_N: the start.
        eps: τ, but at least 64 of the arithmetic's own ε.
    Returns:
        u = Wv/‖Wv‖ and v, unit vectors; σ = uᵀWv is the largest singular value.
    References:
        Miyato et al. 2018, arXiv:1802.05957, algorithm 1; Golub and Van Loan, Matrix Computations, section 10.1.
    """
    dtype = torch.float32 if weight_MN.device.type == "mps" else torch.float64
    tolerance = max(eps, 64 * torch.finfo(dtype).eps)
    steps_N = torch.arange(1, len(v_N) + 1, dtype=dtype, device=weight_MN.device)
    nudge_N = (steps_N * 0.6180339887498949).frac() - 0.5  # of no pattern that a weight has
    found_N = _unit(_unit(v_N.to(nudge_N)).nan_to_num(0.0, 0.0, 0.0) + _NUDGE * _unit(nudge_N))
    for _ in range(_CYCLES):
        basis_KN, images_KN, converged = _krylov(weight_MN, found_N, tolerance)
        if converged:
            break
        ritz_KK = _sum((basis_KN[:, None] * images_KN[None]).permute(2, 0, 1))
        found_N = _unit(_sum(_dominant(ritz_KK + ritz_KK.T)[:, None] * basis_KN))
    image_M = torch.cat([_sum((rows * found_N).T) for rows in _blocks(weight_MN)])
    found_M = _unit(image_M)
    return (found_M, found_N) if found_M.isfinite().all() else (u_M, v_N)


def refined(weight_MN: Tensor, v_N: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return u and v after ``steps`` power iterations, as `torch.nn.utils.spectral_norm` does them in a training."""
    weight_MN, u_M = weight_MN.float(), v_N
    v_N = v_N.to(weight_MN)
    for _ in range(steps):
        u_M = normalize(weight_MN @ v_N, dim=0)
        v_N = normalize(weight_MN.T @ u_M, dim=0)
    return u_M, v_N


def _krylov(weight_MN: Tensor, start_N: Tensor, tolerance: float) -> tuple[Tensor, Tensor, bool]:
    """Return an orthonormal basis [K, N] with its products with WᵀW, and whether the start is an eigenvector."""
    basis: list[Tensor] = [start_N]
    images: list[Tensor] = []
    while True:
        image_N = _gram(weight_MN, basis[-1])
        images.append(image_N)
        rest_N, basis_KN = image_N, torch.stack(basis)
        for _ in range(2):  # once is not enough for orthogonality to rounding
            along_K = _sum((basis_KN * rest_N).T)
            rest_N = rest_N - _sum(basis_KN * along_K[:, None])
        outside, size = float(_norm(rest_N)), float(_norm(image_N))
        exhausted = not outside > tolerance * size  # also of a weight that is zero or not finite
        if exhausted or len(basis) == min(_KRYLOV, len(start_N)):
            return basis_KN, torch.stack(images), exhausted and len(basis) == 1
        basis.append(rest_N / outside)


def _gram(weight_MN: Tensor, v_N: Tensor) -> Tensor:
    """Return WᵀWv; one pass over the weight."""
    total_N = torch.zeros_like(v_N)
    for rows in _blocks(weight_MN):
        total_N += _sum(rows * _sum((rows * v_N).T)[:, None])
    return total_N


def _dominant(ritz_KK: Tensor) -> Tensor:
    """Return the eigenvector of the largest eigenvalue of a positive semidefinite matrix, by squaring it."""
    power_KK = ritz_KK / ritz_KK.abs().max()
    for _ in range(_SQUARINGS):
        before_KK, square_KK = power_KK, _sum(power_KK[:, :, None] * power_KK[:, None])
        power_KK = square_KK / square_KK.abs().max()
        if float((power_KK - before_KK).abs().max()) < torch.finfo(power_KK.dtype).eps:
            break
    return power_KK[0]


def _blocks(weight_MN: Tensor) -> tuple[Tensor, ...]:
    return weight_MN.split(max(1, _BLOCK // weight_MN.shape[1]))


def _sum(x: Tensor) -> Tensor:
    """Return the sum over the first dimension, by halves; overwrites ``x``."""
    while (n := len(x)) > 1:
        half = (n + 1) // 2
        x[: n - half] += x[half:]
        x = x[:half]
    return x[0]


def _norm(x_N: Tensor) -> Tensor:
    return _sum(x_N * x_N).sqrt()


def _unit(x_N: Tensor) -> Tensor:
    return x_N / _norm(x_N)
