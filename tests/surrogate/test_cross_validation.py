"""Cross-validation on folds of a quadratic loss, against refits written as loops.

Shape suffixes: N = candidates, B = examples, F = folds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from quadratic import Quadratic, random_surrogate
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.surrogate import Surrogate
from ckptavg.surrogate.cross_validation import FAR, held_out_of_sizes, shrunk
from ckptavg.surrogate.folds import Folds
from ckptavg.surrogate.optimum import shrunk_optima, shrunk_simplex_optima
from ckptavg.surrogate.subsets import best_subsets

CLOSE = 1e-10  # sums of some tens of terms of order 1
STRENGTHS = [0.0, 0.1, 1.0, 10.0]
F = 3


def folds_of(objective: Quadratic, at: Coefficients | None = None) -> Folds:
    n = objective.n
    mixture = at or Coefficients.uniform(range(n), n)
    beta_N = torch.tensor(mixture.values[0], dtype=torch.float64)
    return Folds.at(beta_N, objective.surrogate(), *objective.gradients(mixture, folds=F))


def fold_losses(objective: Quadratic, beta_N: Tensor) -> list[Tensor]:
    return [objective.each(beta_N @ objective.weights_ND)[fold::F] for fold in range(F)]


def by_hand(objective: Quadratic, kept: list[int]) -> Surrogate:
    """Return the quadratic with the value and gradient of these folds, by differentiation, and all examples' H."""
    beta_N = objective.uniform().requires_grad_()
    loss = torch.cat([fold_losses(objective, beta_N)[fold] for fold in kept]).mean()
    (gradient_N,) = torch.autograd.grad(loss, beta_N)
    return Surrogate(float(loss.detach()), gradient_N - gradient_N.mean(), objective.surrogate().hessian_NN, "exact")


def held_out(objective: Quadratic, fit: Any) -> float:
    """Return Σ_f share_f·q_f(fit on the other folds), literally."""
    total = 0.0
    for fold in range(F):
        examples = len(range(fold, objective.d, F))
        beta_N = fit(by_hand(objective, [other for other in range(F) if other != fold]))
        total += examples / objective.d * float(by_hand(objective, [fold])(beta_N))
    return total


def test_the_folds_are_the_quadratics_of_their_examples():
    """17 examples: folds of 6, 6 and 5. It does not matter at which point they were measured if H is the folds' own."""
    objective = Quadratic(n=4, d=17, seed=0)
    folds = folds_of(objective)
    assert folds.share_F.tolist() == pytest.approx([6 / 17, 6 / 17, 5 / 17])
    near_MN = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.4, -0.2, 0.5, 0.3]], dtype=torch.float64)
    for fold in range(F):
        others = [other for other in range(F) if other != fold]
        for q, kept in ((folds.only(fold), [fold]), (folds.without(fold), others), (folds.q, [0, 1, 2])):
            assert q(near_MN).tolist() == pytest.approx(by_hand(objective, kept)(near_MN).tolist(), abs=CLOSE)
    assert float(folds.q(near_MN[1])) == pytest.approx(objective.score(Coefficients(((0.4, -0.2, 0.5, 0.3),))).loss)


def test_recentered_folds_have_the_real_losses_and_slopes_at_the_new_point():
    there = Coefficients(((0.5, 0.3, 0.4, -0.2),))
    objective = Quadratic(n=4, d=17, seed=1)
    folds, beta_N = folds_of(objective, there), torch.tensor(there.values[0], dtype=torch.float64, requires_grad=True)
    for fold, losses in enumerate(fold_losses(objective, beta_N)):
        q = folds.only(fold)
        (real_N,) = torch.autograd.grad(losses.mean(), beta_N, retain_graph=True)
        (slope_N,) = torch.autograd.grad(q(beta_N), beta_N)
        assert float(q(beta_N.detach())) == pytest.approx(float(losses.detach().mean()), abs=CLOSE)
        assert (slope_N - slope_N.mean()).tolist() == pytest.approx((real_N - real_N.mean()).tolist(), abs=CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_the_held_out_loss_is_that_of_refits_without_each_fold(seed: int):
    objective = Quadratic(n=5, d=23, seed=seed)
    fits = {"affine": shrunk_optima, "simplex": shrunk_simplex_optima}
    expected = {
        (kind, strength): held_out(objective, lambda q, s=strength, f=solve: f(q, [s])[0])
        for kind, solve in fits.items()
        for strength in STRENGTHS
    }
    found = shrunk(folds_of(objective), {"affine": STRENGTHS, "simplex": STRENGTHS})
    assert found is not None
    assert found.held_out == pytest.approx(expected[found.constraint, found.strength], abs=CLOSE)
    assert found.held_out == pytest.approx(min(expected.values()), abs=CLOSE)  # both constraints may have it
    (beta_N,) = fits[found.constraint](objective.surrogate(), [found.strength])
    assert found.beta_N.tolist() == pytest.approx(beta_N.tolist(), abs=CLOSE)
    assert found.fitted == pytest.approx(float(objective.surrogate()(beta_N)), abs=CLOSE)


def test_only_the_given_constraints_and_strengths_are_tried():
    folds = folds_of(Quadratic(n=5, d=23, seed=0))
    found = shrunk(folds, {"simplex": [0.3]})
    assert (found.constraint, found.strength) == ("simplex", 0.3)


def test_a_strength_that_leads_far_away_is_not_tried_if_another_does_not():
    """In a direction with almost no curvature and the same slope in every fold, the held-out quadratic falls far."""
    folds = folds_of(Quadratic(n=5, d=23, seed=0))
    flat_N = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0], dtype=torch.float64) / math.sqrt(2)
    across_NN = torch.eye(5, dtype=torch.float64) - flat_N[:, None] * flat_N
    hessian_NN = across_NN @ folds.q.hessian_NN @ across_NN + 1e-4 * flat_N[:, None] * flat_N
    gradient_FN = folds.gradient_FN + flat_N
    q = replace(folds.q, hessian_NN=hessian_NN, gradient_N=folds.share_F @ gradient_FN)
    steep = replace(folds, q=q, gradient_FN=gradient_FN)
    assert float(shrunk(steep, {"affine": [0.0]}).beta_N.abs().max()) > 100
    found = shrunk(steep, {"affine": [0.0, 0.3, 10.0]})
    assert found.strength > 0 and float(found.beta_N.abs().max()) < FAR


@pytest.mark.parametrize("seed", range(3))
def test_a_convex_quadratic_has_the_positive_eigenvalues_only(seed: int):
    q = random_surrogate(6, seed, psd=False)
    values_N, vectors_NN = torch.linalg.eigh(q.hessian_NN)
    assert values_N[0] < 0
    mean_N, kept_N = torch.full((6,), 1 / 6, dtype=torch.float64), torch.linalg.eigvalsh(q.convex().hessian_NN)
    torch.testing.assert_close(kept_N, values_N.clamp(min=0).sort().values, rtol=1e-9, atol=1e-9)
    assert float(q.convex()(mean_N + 0.1 * vectors_NN[:, -1])) == pytest.approx(
        float(q(mean_N + 0.1 * vectors_NN[:, -1]))
    )


def test_a_single_fold_is_not_held_out():
    objective = Quadratic(n=5, d=23, seed=0)
    mean = Coefficients.uniform(range(5), 5)
    single = Folds.at(objective.uniform(), objective.surrogate(), *objective.gradients(mean, folds=1))
    found = shrunk(single, {"affine": STRENGTHS})
    assert found.strength == 0.0 and found.held_out == pytest.approx(found.fitted)


@pytest.mark.parametrize("seed", range(3))
def test_the_held_out_loss_of_a_size_is_that_of_the_best_subsets_without_each_fold(seed: int):
    objective = Quadratic(n=6, d=23, seed=seed)

    def fit(k: int, q: Surrogate) -> Tensor:
        beta_N = torch.zeros(6, dtype=torch.float64)
        beta_N[list(best_subsets(q, k, 1).masks[0])] = 1 / k
        return beta_N

    found = held_out_of_sizes(folds_of(objective), [1, 2, 5, 6])
    expected = {k: held_out(objective, lambda q, k=k: fit(k, q)) for k in (1, 2, 5, 6)}
    assert found == pytest.approx(expected, abs=CLOSE)


def test_shrinkage_is_chosen_where_the_optimum_fits_noise():
    """More candidates than examples can tell apart: the unshrunk optimum is worse on held-out examples."""
    noise = Quadratic(n=8, d=24, seed=0)
    noise.weights_ND = 5 + 0.1 * noise.weights_ND  # every candidate has the same loss but for noise
    found = shrunk(folds_of(noise), {"affine": [0.0, *(10.0**e for e in range(7))]})
    assert found is not None and found.strength > 0
    unshrunk = held_out(noise, lambda q: shrunk_optima(q, [0.0])[0])
    assert math.isfinite(unshrunk) and found.held_out < unshrunk
