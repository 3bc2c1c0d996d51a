"""Slow, literal oracles: exact rational sums, and the numbers a floating-point format can represent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def exact_sum(coefficients: Sequence[float], values: Sequence[float]) -> Fraction:
    """Return Σ c_i w_i without any rounding."""
    return sum((Fraction(c) * Fraction(w) for c, w in zip(coefficients, values, strict=True)), Fraction(0))


def half_ulp(x: Fraction, dtype: torch.dtype) -> Fraction:
    """Return half the distance between the two numbers of ``dtype`` around ``x``."""
    info = torch.finfo(dtype)
    digits = round(-math.log2(info.eps))
    least = round(math.log2(info.tiny))
    exponent = least
    if x:
        exponent = max(least, math.floor(math.log2(abs(x.numerator)) - math.log2(x.denominator)))
        exponent += abs(x) >= Fraction(2) ** (exponent + 1)  # log2 of the big integers may be slightly off
        exponent -= abs(x) < Fraction(2) ** exponent and exponent > least
    return Fraction(2) ** (exponent - digits) / 2


def bound(coefficients: Sequence[float], values: Sequence[float], dtype: torch.dtype) -> Fraction:
    """Return the error bound of the output: half a unit in the last place of the exact sum, plus N·2⁻⁵³·Σ|c_i w_i|.

    Below 2⁻¹⁰²² products lose absolute, not relative, precision: half of float64's smallest number each.
    """
    total = exact_sum([abs(c) for c in coefficients], [abs(w) for w in values])
    return half_ulp(exact_sum(coefficients, values), dtype) + len(values) * (
        Fraction(2) ** -53 * total + Fraction(2) ** -1075
    )


def nearest(x: Fraction, dtype: torch.dtype) -> Tensor:
    """Return ``x`` rounded once to ``dtype``, ties to even, by search among the neighbours of a first guess."""
    guess = torch.tensor(float(x), dtype=torch.float64).to(dtype)
    around = [
        guess,
        torch.nextafter(guess, guess.new_tensor(math.inf)),
        torch.nextafter(guess, guess.new_tensor(-math.inf)),
    ]
    return min(
        around,
        key=lambda y: (abs(Fraction(float(y)) - x), int(y.view(torch.int16 if y.itemsize == 2 else torch.int32)) & 1),
    )


def swag_moments(
    w_ND: NDArray[np.float64], k: int, c: float, *, running: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean [D] and covariance [D, D] of SWAG: c (diag(E[w²] − E[w]²) + D̂ D̂ᵀ/(K − 1)), step by step.

    Maddox et al. 2019, algorithm 1: D̂ has the deviations of the last K models from the mean so far (or of all).
    """
    mean_D, square_D = np.zeros_like(w_ND[0]), np.zeros_like(w_ND[0])
    means = list[NDArray[np.float64]]()
    for i, w_D in enumerate(w_ND):
        mean_D, square_D = (mean_D * i + w_D) / (i + 1), (square_D * i + w_D**2) / (i + 1)
        means.append(mean_D)
    covariance_DD = np.diag(square_D - mean_D**2)
    for i in range(len(w_ND) - k, len(w_ND)):
        d_D = w_ND[i] - (means[i] if running else mean_D)
        covariance_DD = covariance_DD + np.outer(d_D, d_D) / (k - 1)
    return mean_D, c * covariance_DD
