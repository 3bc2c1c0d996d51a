"""Other intervals of the mean of paired differences, which intervals.py compares with that of ckptavg.

Shape suffixes: R = draws, U = units, B = resamples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

Array = np.ndarray
Interval = tuple[Array, Array]  # lower and upper ends
RESAMPLES, FEW_DRAWS = 400, 300  # of the bootstraps
METHODS = ("t", "percentile", "bootstrap-t", "BCa", "Agresti-Min", "Tango", "Wilson", "McNemar")
Z = stats.norm.ppf(0.975)


def other_intervals(d_RU: Array, rng: np.random.Generator) -> Mapping[str, Interval]:
    """Return method → intervals; those for answers that are right or wrong only if all differences are 0, 1 or −1."""
    found = {"t": student(d_RU), **bootstraps(d_RU, rng), "BCa": bca(d_RU, rng)}
    return {**found, **binary(d_RU)} if set(np.unique(d_RU)) <= {-1, 0, 1} else found


def student(d_RU: Array) -> Interval:
    n = d_RU.shape[1]
    mean_R, half_R = d_RU.mean(axis=1), stats.t.ppf(0.975, n - 1) * d_RU.std(axis=1, ddof=1) / n**0.5
    return mean_R - half_R, mean_R + half_R


def bootstraps(d_RU: Array, rng: np.random.Generator) -> Mapping[str, Interval]:
    """Return the percentile interval and the bootstrap-t."""
    ends: dict[str, list[Array]] = {"percentile": [], "bootstrap-t": []}
    n = d_RU.shape[1]
    for d_U in d_RU[:FEW_DRAWS]:
        drawn_BU = d_U[rng.integers(0, n, (RESAMPLES, n))]
        means_B, errors_B = drawn_BU.mean(axis=1), drawn_BU.std(axis=1)
        ends["percentile"].append(np.quantile(means_B, [0.025, 0.975]))
        t_B = np.divide(means_B - d_U.mean(), errors_B, out=np.zeros_like(means_B), where=errors_B > 0)
        ends["bootstrap-t"].append(d_U.mean() - d_U.std() * np.quantile(t_B, [0.975, 0.025]))
    return {name: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for name, pairs in ends.items()}


def bca(d_RU: Array, rng: np.random.Generator) -> Interval:
    if d_RU.shape[1] > 200:
        return np.full(1, np.nan), np.full(1, np.nan)
    found = stats.bootstrap((d_RU[:FEW_DRAWS],), np.mean, axis=1, n_resamples=RESAMPLES, batch=20, rng=rng)
    return found.confidence_interval.low, found.confidence_interval.high


def binary(d_RU: Array) -> Mapping[str, Interval]:
    """Return intervals for paired answers from the numbers of discordant ones."""
    n = d_RU.shape[1]
    b_R, c_R = (d_RU > 0).sum(axis=1), (d_RU < 0).sum(axis=1)
    m_R = np.maximum(b_R + c_R, 1)
    agresti = (b_R - c_R) / (n + 2)
    half = Z * np.sqrt(b_R + c_R + 1 - (b_R - c_R) ** 2 / (n + 2)) / (n + 2)
    centre, spread = (b_R + Z**2 / 2) / (m_R + Z**2), Z / (m_R + Z**2) * np.sqrt(b_R * c_R / m_R + Z**2 / 4)
    exact_low = np.where(b_R > 0, stats.beta.ppf(0.025, b_R, c_R + 1), 0)
    exact_high = np.where(c_R > 0, stats.beta.ppf(0.975, b_R + 1, c_R), 1)
    return {
        "Agresti-Min": (agresti - half, agresti + half), "Tango": (_tango(b_R, c_R, n, 1), _tango(b_R, c_R, n, -1)),
        "Wilson": tuple((2 * (centre + sign * spread) - 1) * m_R / n for sign in (-1, 1)),
        "McNemar": ((2 * exact_low - 1) * m_R / n, (2 * exact_high - 1) * m_R / n),
    }  # fmt: skip


def _tango(b_R: Array, c_R: Array, n: int, sign: int) -> Array:
    """Return the lower end (sign 1) or the upper end of Tango's score interval, by bisection."""
    inside_R, outside_R = (b_R - c_R) / n, np.full(len(b_R), -float(sign))
    for _ in range(50):
        delta_R = (inside_R + outside_R) / 2
        linear_R = -b_R - c_R + (2 * n - b_R + c_R) * delta_R
        root_R = np.sqrt(np.maximum(linear_R**2 + 8 * n * c_R * delta_R * (1 - delta_R), 0))
        variance_R = n * ((root_R - linear_R) / (2 * n) + delta_R * (1 - delta_R))
        reached_R = sign * (b_R - c_R - n * delta_R) / np.sqrt(np.maximum(variance_R, 1e-12)) < Z
        inside_R, outside_R = np.where(reached_R, delta_R, inside_R), np.where(reached_R, outside_R, delta_R)
    return inside_R
