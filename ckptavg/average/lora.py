"""Average LoRA adapters in weight space: Σ_i c_i s B_i A_i, which differs from s (Σ_i c_i B_i)(Σ_i c_i A_i).

Shape suffixes: K = candidates with a non-zero coefficient, R = rank of the result or of K stacked adapters, I = input
features, O = output features.

References:
    Hu et al. 2022, LoRA, arXiv:2106.09685 (W + s B A with s = α/r); Kalajdzievski 2023, rsLoRA, arXiv:2312.03732
    (s = α/√r).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptavg.average import weighted_sum
from ckptavg.average.lora_config import CONFIG_NAME, FACTOR_A, Config, check, obstacle, partner, stacked_config
from ckptavg.average.lora_file import FileConfig
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.integrity import not_finite
from ckptavg.checkpoints.numbers import Floats, is_finite, round_into, widened
from ckptavg.coefficients import Coefficients
from ckptavg.errors import InputError
from ckptavg.readers import FLOATING, StoredTensor
from ckptavg.runtime.threads import count

_Matrix: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Module:
    """A module of the base model with its factors."""

    name: str
    a: str  # name of the factor A
    b: str
    r: int  # rank of the factors
    scaling: float  # s of s B A
    terms: Sequence[tuple[float, Checkpoint]]  # the non-zero coefficients and their candidates

    def stacked(self) -> tuple[_Matrix, _Matrix, _Matrix]:
        """Return c_K and the stacked factors A_RI and B_OR, in float64."""
        c_K = np.array([c for c, _ in self.terms])
        a_RI = np.concatenate([_read(source, self.a) for _, source in self.terms], dtype=np.float64)
        b_OR = np.concatenate([_read(source, self.b) for _, source in self.terms], axis=1, dtype=np.float64)
        return c_K, a_RI, b_OR

    def squares(self) -> tuple[float, float]:
        """Return the squared norms of the error of averaging factors and of the exact average; see `factor_error`."""
        c_K, gram_RR = np.array([c for c, _ in self.terms]), np.ones(())
        centred = math.isclose(c_K.sum(), 1)
        for name in (self.a, self.b):
            size = self.terms[0][1].spec(name).numel // self.r
            stack_KRF = np.empty(
                (len(c_K) + 1, self.r, size), np.float32
            )  # F: features; the last pair of factors is the mean
            for factor_RF, (_, source) in zip(stack_KRF, self.terms, strict=False):
                factor_RF[:] = _read(source, name) if name == self.a else _read(source, name).T
            stack_KRF[-1] = np.tensordot(c_K.astype(np.float32), stack_KRF[:-1], 1)
            if centred:
                stack_KRF[:-1] -= stack_KRF[-1]
            flat_RF = stack_KRF.reshape(-1, size)
            gram_RR = gram_RR * (flat_RF @ flat_RF.T).astype(np.float64)
        sums = (np.repeat([*c_K, mean], self.r) for mean in ((0, 1) if centred else (-1, 0)))
        error, norm = (self.scaling**2 * max(0.0, float(c_R @ gram_RR @ c_R)) for c_R in sums)
        return error, norm


def factor_error(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, config: Config | FileConfig | None = None
) -> float:
    """Return the error of averaging factors: ‖s B̄ Ā − Σ_i c_i s B_i A_i‖ / ‖Σ_i c_i s B_i A_i‖ over all modules.

    If Σ_i c_i = 1, the difference is Σ_i c_i s (B_i − B̄)(A_i − Ā), up to its sign, and without cancellation. Norms are
    those of sums Σ_k t_k B_k A_k, in which the mean is one more pair of factors: with factors stacked to B_OR and A_RI,
    ‖·‖² = tᵀ(A Aᵀ ∘ BᵀB)t, each t_k once for each of its r columns. For DoRA this is the error before normalization.
    Returns 0 if both norms are 0, and infinity if only the second is. ``config`` has the scaling, by default that of
    `check`; for the other arguments see `exact`. In float32, so to about six digits: it is a figure for a report.

    Raises:
        InputError: if they have no LoRA factors, or a factor is NaN or infinite.
        DisagreementError: see `check`.
    """
    modules = _modules(checkpoints, coefficients, config or check(checkpoints))
    from threadpoolctl import threadpool_limits  # only adapters need it

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(count()) as pool:
        squares = list(pool.map(_Module.squares, modules))
    return _ratio(math.fsum(error for error, _ in squares), math.fsum(norm for _, norm in squares))


def exact(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, rank: int | None = None, dtype: str | None = None
) -> weighted_sum.PlannedOutput:
    """Build one adapter whose product is ΔW = Σ_i c_i s B_i A_i in every module.

    At full rank, A [K r, I] stacks the A_i, bit for bit, and B [O, K r] concatenates the c_i B_i, where each element is
    the float64 product rounded once, to within half a unit in the last place of the output's dtype. With ``rank``
    R < K r it is the nearest product of that rank (Eckart and Young 1936), B = Q_B U √Σ and A = √Σ Vᵀ Q_Aᵀ, from QR of
    both stacks and an SVD of R_B diag(c) R_Aᵀ; its last bits may depend on the number of threads. α is scaled with the
    rank so that s is unchanged. Biases, trained embeddings and ``modules_to_save`` are averaged elementwise.

    Memory: about five float64 copies of the factors of one module of K candidates. With ``rank`` they are read twice.

    Args:
        checkpoints: N open adapters with equal names, shapes and dtypes.
        coefficients: their coefficients, of any sign; a module uses the row of its A.
        rank: maximum rank of a module, at least 1, or None for K r.
        dtype: dtype of the floating-point tensors, or None for the candidates' dtypes.
    Raises:
        InputError: if ΔW is not such a sum (DoRA, other kinds of adapters), or a value is NaN or infinite.
        DisagreementError: see `check`.
    """
    config, first = check(checkpoints), checkpoints[0]
    if reason := obstacle(first, config):
        hint = "average the factors: --adapter factors"
        raise InputError(f"exact averaging is not possible: {reason}", path=first.path, hint=hint)
    modules, k = _modules(checkpoints, coefficients, config), len(coefficients.selected)
    ranks = {module.name: min(k * module.r, rank or k * module.r) for module in modules}
    specs = weighted_sum.output_specs(checkpoints, dtype)
    rest = {name: range(spec.numel) for name, spec in specs.items()}
    for m in modules:
        a, b = specs[m.a], specs[m.b]
        specs[m.a] = replace(a, shape=(ranks[m.name], *a.shape[1:]))
        specs[m.b] = replace(b, shape=(b.shape[0], ranks[m.name], *b.shape[2:]))
        del rest[m.a], rest[m.b]
    new_config = stacked_config(config, min(k * config.r, rank or k * config.r), ranks)
    full_rank = all(ranks[module.name] == k * module.r for module in modules)
    lost = 0.0 if full_rank else _lost(modules, ranks)
    note = f"the adapter has rank {new_config['r']}: it is the average in weight space"
    if lost:
        note = f"the adapter was reduced to rank {rank}, which lost {lost:.1%} of the average"
    others = weighted_sum.weighted_average(checkpoints, coefficients, specs, only=rest)
    parts = chain(_factors(first, modules, ranks, specs), others)
    kept = weighted_sum.not_averaged(first)
    return weighted_sum.PlannedOutput(
        specs=specs, parts=parts, config=new_config, lost=lost, notes=[note], not_averaged=kept
    )


def _factors(
    first: Checkpoint, modules: Sequence[_Module], ranks: Mapping[str, int], specs: Mapping[str, StoredTensor]
) -> Iterator[weighted_sum.Part]:
    for module in modules:
        c_K, a_RI, b_OR = module.stacked()
        b_OR, rank = b_OR * np.repeat(c_K, module.r), ranks[module.name]
        if rank < len(a_RI):
            a_RI, b_OR = _nearest(a_RI, b_OR, rank)
        # zeros, if a coefficient group selects fewer candidates or B A has a lower rank
        more = (0, rank - len(a_RI))
        padded = {module.a: np.pad(a_RI, (more, (0, 0))), module.b: np.pad(b_OR, ((0, 0), more))}
        for name, factor in padded.items():
            data, dtype = bytearray(specs[name].nbytes), specs[name].dtype
            with np.errstate(over="ignore"):
                round_into(data, dtype, factor.ravel())
            if not is_finite(data, dtype):
                raise weighted_sum.overflow_error(first, name, dtype)
            yield weighted_sum.Part(name, 0, memoryview(data))


def _lost(modules: Sequence[_Module], ranks: Mapping[str, int]) -> float:
    dropped = total = 0.0
    for module in modules:
        c_K, a_RI, b_OR = module.stacked()
        r_B, r_A = _triangles(a_RI, b_OR * np.repeat(c_K, module.r))
        energies = np.square(module.scaling * np.linalg.svd(r_B @ r_A.T, compute_uv=False))
        dropped, total = dropped + float(energies[ranks[module.name] :].sum()), total + float(energies.sum())
    return _ratio(dropped, total)


def _triangles(a_RI: _Matrix, b_OR: _Matrix) -> tuple[_Matrix, _Matrix]:
    """Return R_B and R_A of B = Q_B R_B and Aᵀ = Q_A R_A: R_B M R_Aᵀ has the singular values of B M A."""
    r_B, r_A = (np.asarray(np.linalg.qr(matrix, mode="r")) for matrix in (b_OR, a_RI.T))
    return r_B, r_A


def _nearest(a_RI: _Matrix, b_OR: _Matrix, rank: int) -> tuple[_Matrix, _Matrix]:
    """Return factors of the best rank-``rank`` approximation of B A; fewer rows if B A has a lower rank."""
    (q_B, r_B), (q_A, r_A) = np.linalg.qr(b_OR), np.linalg.qr(a_RI.T)
    u, sigma, vh = np.linalg.svd(r_B @ r_A.T, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    return ((q_A @ vh[:rank].T) * root).T, (q_B @ u[:, :rank]) * root


def _read(source: Checkpoint, name: str) -> Floats:
    """Read a factor as a matrix; dimensions after the first are flattened, as in convolutions."""
    spec, buffer = source.spec(name), source.read(name)
    if not is_finite(buffer, spec.dtype) and (error := not_finite(source, name)):
        raise error
    return widened(buffer, spec.dtype).reshape(spec.shape[0], -1)


def _modules(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, config: Config | FileConfig
) -> list[_Module]:
    checkpoint = checkpoints[0]
    modules: list[_Module] = []
    for a, name in ((a, match[1]) for a in checkpoint.names if (match := FACTOR_A.fullmatch(a))):
        b, r = partner(a), config.rank(name)
        if b not in checkpoint.tensors:
            raise InputError(f"is missing, but {a} is present", path=checkpoint.path, tensor=b)
        for factor, dimension in ((a, 0), (b, 1)):
            spec = checkpoint.spec(factor)
            shape, message = list(spec.shape), None
            if spec.dtype not in FLOATING or len(shape) < 2 or not spec.numel:
                message = f"dtype {spec.dtype} and shape {shape} are not those of a LoRA factor (saved from a shard?)"
            # in a grouped convolution each output of B uses only a part of the rank
            elif shape[dimension] != r or (dimension and spec.numel != shape[0] * r):
                message = f"has shape {shape}, but dimension {dimension} must be the rank {r} in {CONFIG_NAME}"
            if message:
                raise InputError(message, path=checkpoint.path, tensor=factor)
        terms = [(c, source) for c, source in zip(coefficients.row(a), checkpoints, strict=True) if c != 0]
        modules.append(_Module(name=name, a=a, b=b, r=r, scaling=config.scaling(name), terms=terms))
    if not modules:
        raise InputError("it has no LoRA factors", path=checkpoint.path)
    return modules


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else math.inf if part else 0.0
