"""SWAG's variance and mean are more exact than those of other implementations, each written here from its formula.

Shape suffixes: N = checkpoints, D = parameters, K = kept deviations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stored import averaged, stored

from ckptavg.average.noise import Deviations

N, D, RATIO = 20, 2000, 1000
Float = NDArray[np.float32]
Moments = tuple[NDArray[np.floating], NDArray[np.floating]]


@pytest.fixture(scope="module")
def weights_ND() -> Float:
    """Return 20 checkpoints whose weights are 1,000 times as large as their deviation, as late in a training."""
    return (RATIO + np.random.default_rng(0).standard_normal((N, D))).astype(np.float32)


@pytest.fixture(scope="module")
def exact(weights_ND: Float) -> Moments:
    """Return mean and variance, in 80 bits."""
    wide_ND = weights_ND.astype(np.longdouble)
    return wide_ND.mean(axis=0).astype(np.float64), wide_ND.var(axis=0).astype(np.float64)


@pytest.fixture(scope="module")
def ours(weights_ND: Float, tmp_path_factory: pytest.TempPathFactory) -> Moments:
    """Return mean and variance as ckptavg has them: the mean as it is written, the deviation as it is drawn."""
    folder: Path = tmp_path_factory.mktemp("peers")
    checkpoints = stored(folder, [{"w": torch.from_numpy(w_D)} for w_D in weights_ND])
    mean_D = averaged(checkpoints, [1 / N] * N)["w"].numpy()
    return mean_D, Deviations(checkpoints)("w", 0, D).astype(np.float64) ** 2


def swa_gaussian(w_ND: Float) -> tuple[Float, Float]:
    """Running means of w and w² in float32, and the clamped difference of E[w²] and E[w]²."""
    mean_D, square_D = np.zeros_like(w_ND[0]), np.zeros_like(w_ND[0])
    for n, w_D in enumerate(w_ND):
        a, b = np.float32(n / (n + 1)), np.float32(1 / (n + 1))
        mean_D, square_D = mean_D * a + w_D * b, square_D * a + w_D**2 * b
    return mean_D, np.maximum(square_D - mean_D**2, np.float32(1e-30))


def torch_uncertainty(w_ND: Float) -> tuple[Float, Float]:
    """The first snapshot is counted as one model that was averaged before it is averaged; clamp of 1e-6."""
    mean_D, square_D, averaged_models = w_ND[0].copy(), w_ND[0] ** 2, 1
    for w_D in w_ND:
        a, b = np.float32(averaged_models / (averaged_models + 1)), np.float32(1 / (averaged_models + 1))
        mean_D, square_D = mean_D * a + w_D * b, square_D * a + w_D**2 * b
        averaged_models += 1
    return mean_D, np.maximum(square_D - mean_D**2, np.float32(1e-6))


def lightning_uq_box(initial_D: Float, w_ND: Float) -> tuple[Float, Float]:
    """The mean begins as a copy of the initial weights, to which the first update adds."""
    mean_D, square_D = initial_D.copy(), initial_D**2
    for n, w_D in enumerate(w_ND):
        a = np.float32(1 / (n + 1))
        mean_D = (mean_D * np.float32(max(n, 1)) + w_D) * a
        square_D = (square_D * np.float32(max(n, 1)) + w_D**2) * a
    return mean_D, np.maximum(square_D - mean_D**2, np.float32(1e-30))


def error(found_D: NDArray[np.floating], exact_D: NDArray[np.float64]) -> float:
    return float(np.median(np.abs(found_D.astype(np.float64) - exact_D) / exact_D))


def test_the_variance_is_exact_where_a_difference_of_squares_is_noise(
    weights_ND: Float,
    exact: Moments,
    ours: Moments,
):
    """Float32 has 24 bits, of which w²/σ² = 10⁶ takes 20; σ is rounded once to float32, so σ² has two of its errors."""
    assert error(ours[1], exact[1]) < 1e-6 and np.abs(ours[1] / exact[1] - 1).max() < 2**-23 + 1e-9
    peers = {"swa_gaussian": swa_gaussian(weights_ND), "torch-uncertainty": torch_uncertainty(weights_ND)}
    for name, (_, variance_D) in peers.items():
        assert error(variance_D, exact[1]) > 0.05, name


def test_the_mean_weighs_every_checkpoint_equally(
    weights_ND: Float,
    exact: Moments,
    ours: Moments,
):
    """In units of σ: torch-uncertainty counts the first checkpoint twice, lightning-uq-box the initial weights too."""
    mean_D, sigma = exact[0], np.sqrt(exact[1])
    assert (np.abs(ours[0] - mean_D) <= np.spacing(np.float32(RATIO)) / 2).all()
    first_D = np.abs(weights_ND[0] - mean_D) / (N + 1)
    off_D = np.abs(torch_uncertainty(weights_ND)[0] - mean_D)
    assert np.median(off_D / sigma) == pytest.approx(np.median(first_D / sigma), rel=0.05)
    off_D = np.abs(lightning_uq_box(np.zeros(D, np.float32) - RATIO, weights_ND)[0] - mean_D)
    np.testing.assert_allclose(off_D, RATIO / N, rtol=0.01)
    assert np.median(off_D / sigma) > 40


def test_weights_that_hardly_move_keep_their_deviation(tmp_path: Path):
    """A clamp of the variance at 1e-6 draws them with σ = 10⁻³, a hundred times too wide."""
    w_ND = (1e-5 * np.random.default_rng(1).standard_normal((N, D))).astype(np.float32)
    found_D = Deviations(stored(tmp_path, [{"w": torch.from_numpy(w_D)} for w_D in w_ND]))("w", 0, D)
    exact_D = w_ND.astype(np.float64).std(axis=0)
    np.testing.assert_allclose(found_D, exact_D, rtol=1e-6)
    assert np.median(np.sqrt(torch_uncertainty(w_ND)[1]) / exact_D) > 90
