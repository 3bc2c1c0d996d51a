"""Choose by held-out loss on the folds of a surrogate: the shrinkage of coefficients, and the size of a subset.

Shape suffixes: F = folds, N = candidates, S = strengths.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from ckptavg.surrogate.folds import Folds
from ckptavg.surrogate.optimum import shrunk_optima, shrunk_simplex_optima
from ckptavg.surrogate.subsets import best_of_sizes

Constraint: TypeAlias = Literal["affine", "simplex"]
STRENGTHS: Final = (0.0, *(10 ** (half / 2) for half in range(-8, 7)))
"""Strengths of the shrinkage to try, ascending, in units of the mean curvature."""
FAR: Final = 10.0  # coefficients beyond which no loss is near a quadratic
_SOLVE: Final = {"affine": shrunk_optima, "simplex": shrunk_simplex_optima}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Coefficients on all folds, with the shrinkage that has the lowest held-out loss.

    Attributes:
        beta_N: [N], sums to 1.
        constraint: the set of coefficients.
        strength: the strength of the shrinkage.
        held_out: the mean loss of the folds, each at coefficients that were fitted without it.
        fitted: q(β) of all folds.
    """

    beta_N: Tensor
    constraint: Constraint
    strength: float
    held_out: float
    fitted: float


def shrunk(folds: Folds, strengths: Mapping[Constraint, Sequence[float]]) -> Fit:
    """Return the fit with the lowest held-out loss over the given constraints and strengths.

    For every constraint, strength λ and fold f, q of the other folds plus λ·h/2·‖β − 1/N‖² is minimised and q_f
    evaluated there; the λ with the lowest mean of these is used on all folds. A single fold is not held out. A λ that
    leads to coefficients beyond `FAR` is left out if another one does not.

    References:
        Stone 1974, Cross-validatory choice and assessment of statistical predictions, JRSS B 36.
    """
    fits: list[Fit] = []
    for constraint, tried in strengths.items():
        solve = _SOLVE[constraint]
        beta_FSN = solve(folds.q, tried, torch.stack([folds.without(f).gradient_N for f in range(len(folds))]))
        held_FS = torch.stack([folds.only(f)(beta_SN) for f, beta_SN in enumerate(beta_FSN)])
        held_S = folds.share_F @ held_FS
        near_S = beta_FSN.abs().amax(dim=(0, 2)) <= FAR
        held_S = held_S.masked_fill(~near_S, math.inf) if near_S.any() else held_S
        best = int(held_S.argmin())
        beta_N = solve(folds.q, [tried[best]])[0]
        fits.append(
            Fit(
                beta_N=beta_N, constraint=constraint, strength=tried[best],
                held_out=float(held_S[best]), fitted=float(folds.q(beta_N)),
            )
        )  # fmt: skip
    return min(fits, key=lambda fit: fit.held_out)


def held_out_of_sizes(folds: Folds, sizes: Sequence[int]) -> dict[int, float]:
    """Return K → the held-out loss of the best subset of K candidates.

    For every fold f, the best subset on the other folds is searched, without those on all folds, which know f, and q_f
    is evaluated at its uniform average.
    """
    held_K = torch.zeros(len(sizes), dtype=torch.float64)
    for f, share in enumerate(folds.share_F.tolist()):
        rows_KN = torch.zeros(len(sizes), folds.q.n, dtype=torch.float64)
        for row_N, mask in zip(rows_KN, best_of_sizes(folds.without(f), sizes).values(), strict=True):
            row_N[list(mask)] = 1 / len(mask)
        held_K += share * folds.only(f)(rows_KN)
    return dict(zip(sizes, held_K.tolist(), strict=True))
