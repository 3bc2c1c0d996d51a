"""The quadratic solver of SeWA and TWA on quadratic losses and on real networks."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK, Job, Run
from quadratic import Quadratic
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.strategies.sewa import SeWA
from ckptavg.strategies.solvers import subspace
from ckptavg.strategies.twa import TWA
from ckptavg.surrogate.subsets import best_subsets


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 3, 9])
def test_the_best_subset_of_a_quadratic_is_found(seed: int, k: int):
    objective = Quadratic(n=9, d=6, seed=seed)
    learned = SeWA(k=k, solver="quadratic").learn(objective)
    best = min(itertools.combinations(range(9), k), key=objective.of_subset)
    assert learned.coefficients == Coefficients.uniform(best, 9)
    (rows,) = learned.tables.values()
    assert [row["K"] for row in rows] == list(range(1, 10))
    for row in rows:
        size = row["K"]
        assert isinstance(size, int)
        least = min(map(objective.of_subset, itertools.combinations(range(9), size)))
        assert row["quadratic"] == pytest.approx(least, rel=1e-9)


def test_auto_takes_the_size_with_the_best_score():
    objective = Quadratic(n=8, d=6, seed=3)
    learned = SeWA(k="auto", solver="quadratic").learn(objective)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(8), k) for k in range(1, 9))
    assert learned.coefficients.selected == min(subsets, key=objective.of_subset)
    (rows,) = learned.tables.values()
    assert all(row["loss"] == pytest.approx(row["quadratic"]) for row in rows)


def test_auto_returns_the_best_scored_subset():
    """Also if the best subset has another size than the first best."""
    found: list[float] = []

    class Rough(Quadratic):
        def score(self, coefficients: Coefficients, on: Any = None) -> Any:
            score = super().score(coefficients, on)
            rough = (score.loss or 0.0) + 0.3 * math.sin(37.0 * sum(i * i for i in coefficients.selected))
            found.append(rough)
            return type(score)(value=-found[0] * rough, loss=rough, metric=None, examples=1)

    for seed in range(5):
        found.clear()
        objective = Rough(n=8, d=6, seed=seed)
        learned = SeWA(k="auto", solver="quadratic").learn(objective)
        assert objective.score(learned.coefficients).loss == min(found)


def test_the_best_real_loss_wins_among_the_verified():
    """Real scores correct a surrogate whose first choice is wrong."""

    class Wrong(Quadratic):
        def score(self, coefficients: Coefficients, on: Any = None) -> Any:
            score = super().score(coefficients, on)
            worse = coefficients.selected == self.first
            return type(score)(
                value=score.value - 9 * worse, loss=(score.loss or 0) + 9 * worse, metric=None, examples=1
            )

    objective = Wrong(n=7, d=5, seed=0)
    ranked = sorted(itertools.combinations(range(7), 3), key=objective.of_subset)
    objective.first = ranked[0]
    assert SeWA(k=3, solver="quadratic").learn(objective).coefficients.selected == ranked[1]
    assert SeWA(k=3, solver="quadratic", verify=1).learn(objective).coefficients.selected == ranked[0]


class Curved(Quadratic):
    """ℓ(c) = mean (v² + v⁴), v = Σ_i c_i w_i: not quadratic, so the surrogate at the mean is wrong elsewhere."""

    def each(self, v_D: Tensor) -> Tensor:
        return v_D.square() + v_D.square().square()


def test_recentering_finds_the_best_subset_of_a_loss_that_is_not_quadratic():
    moved, still = 0, 0
    for seed in range(12):
        objective = Curved(n=10, d=24, seed=seed)
        losses = {
            mask: objective.score(Coefficients.uniform(mask, 10)).loss or 0.0
            for mask in itertools.combinations(range(10), 4)
        }
        chosen = SeWA(k=4, solver="quadratic").learn(objective).coefficients.selected
        moved += losses[chosen] == min(losses.values())
        around_the_mean = best_subsets(objective.surrogate(), 4, 3).masks
        still += min(losses[mask] for mask in around_the_mean) == min(losses.values())
    assert still < moved == 12


@pytest.mark.parametrize("constraint", ["affine", "simplex"])
def test_recentering_comes_closer_to_the_optimum(constraint: Any, monkeypatch: pytest.MonkeyPatch):
    objective = Curved(n=6, d=16, seed=1, scale=2.0)
    trained = objective.score(TWA(constraint=constraint, epochs=600, lr=0.1).learn(objective).coefficients)
    losses: list[float] = []
    for moves in (0, subspace.MOVES):
        monkeypatch.setattr(subspace, "MOVES", moves)
        learned = TWA(solver="quadratic", constraint=constraint, radius=100.0).learn(objective)
        losses.append(objective.score(learned.coefficients).loss or 0.0)
    assert trained.loss is not None and losses[1] < losses[0]
    assert losses[1] - trained.loss < 0.5 * (losses[0] - trained.loss)


def test_a_recentered_quadratic_is_exact_at_its_new_center():
    objective = Curved(n=5, d=8, seed=3)
    there = Coefficients(((0.5, 0.3, 0.4, -0.3, 0.1),))
    beta_N = torch.tensor(there.values[0], dtype=torch.float64, requires_grad=True)
    value, gradient_N = objective.gradient(there)
    q = objective.surrogate().recentered(beta_N.detach(), value, gradient_N)
    (slope_N,) = torch.autograd.grad(q(beta_N), beta_N)
    assert float(q(beta_N.detach())) == pytest.approx(value, rel=1e-12)
    assert (slope_N - slope_N.mean()).tolist() == pytest.approx(gradient_N.tolist(), abs=1e-12)
    assert torch.equal(q.hessian_NN, objective.surrogate().hessian_NN)


@pytest.mark.parametrize("constraint", ["affine", "simplex"])
def test_the_optimum_of_a_quadratic_is_found_in_one_pass(constraint: Any):
    objective = Quadratic(n=6, d=16, seed=1)
    solved = TWA(solver="quadratic", constraint=constraint, radius=100.0).learn(objective).coefficients
    trained = TWA(constraint=constraint, epochs=600, lr=0.1).learn(objective).coefficients
    assert objective.score(solved).value >= objective.score(trained).value - 1e-6
    if constraint == "simplex":
        assert min(solved.values[0]) >= -1e-12


def test_a_small_radius_stays_near_the_mean():
    objective = Quadratic(n=6, d=16, seed=1)
    near, far = (TWA(solver="quadratic", radius=radius).learn(objective) for radius in (0.01, 100.0))
    mean = torch.full((6,), 1 / 6, dtype=torch.float64)
    moved = [float((torch.tensor(one.coefficients.values[0]) - mean).norm()) for one in (near, far)]
    assert 0 < moved[0] < 0.02 < moved[1]


def test_the_mean_is_returned_if_the_real_loss_rises():
    class Rising(Quadratic):
        def score(self, coefficients: Coefficients, on: Any = None) -> Any:
            off = sum((c - 1 / self.n) ** 2 for c in coefficients.values[0])
            score = super().score(coefficients, on)
            return type(score)(value=-off, loss=off, metric=None, examples=1)

    learned = TWA(solver="quadratic").learn(Rising(n=5, d=8, seed=0))
    assert learned.coefficients == Coefficients(((0.2,) * 5,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: SeWA(k="auto"), "--k auto needs --solver quadratic"),
        (lambda: SeWA(verify=0), "--verify must be at least 1"),
        (lambda: TWA(radius=0.0), "--radius must be greater than 0"),
    ],
)
def test_invalid_settings_are_refused(settings: Any, message: str):
    with pytest.raises(UsageError, match=message):
        settings()


def test_the_quadratic_solver_needs_a_loss():
    class Scored(Quadratic):
        losses = None

    for strategy in (SeWA(solver="quadratic", k=2), TWA(solver="quadratic")):
        with pytest.raises(UsageError, match="needs a loss"):
            strategy.learn(Scored(n=4, d=3, seed=0))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["cnn", "mlp", "transformer"])
def test_on_networks_the_verified_subset_is_among_the_best(jobs: dict[str, Job], name: str):
    with jobs[name].mixture(last=9) as mixture:
        learned = SeWA(k=4, solver="quadratic").learn(mixture)
        losses = {
            mask: mixture.score(Coefficients.uniform(mask, 9)).loss or 0.0
            for mask in itertools.combinations(range(9), 4)
        }
    assert sorted(losses, key=losses.__getitem__).index(learned.coefficients.selected) <= 2  # of 126


def test_the_command_line(digits: Path, run: Run, tmp_path: Path):
    done = run("sewa", digits, "--k", 5, "--solver", "quadratic", "--task", TASK, "--last", 12, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert sum(one["coefficient"] > 0 for one in report["candidates"]) == 5
    assert len(report["tables"]["best subset of each size"]) == 12
    auto = run("sewa", digits, "--k", "auto", "--solver", "quadratic", "--task", TASK, "--last", 8, "--force")
    assert auto.returncode == 0 and "best subset of each size" in auto.stderr, auto.stderr
    assert run("sewa", digits, "--k", "many", "--task", TASK).returncode == 2
    solved = run("twa", digits, "--solver", "quadratic", "--task", TASK, "--last", 8, "--force")
    assert solved.returncode == 0 and "from the mean to the optimum" in solved.stderr, solved.stderr


def test_landscape_reports_the_error_of_the_quadratic(digits: Path, run: Run, tmp_path: Path):
    base = ("landscape", digits, "--task", TASK, "--last", 8)
    done = run(*base, "--samples", 16)
    assert (done.returncode, done.stdout) == (0, "landscape.json\n"), done.stderr
    found = json.loads((tmp_path / "landscape.json").read_text())
    assert found["spearman"] > 0.8 and len(found["measured"]) == 16 and len(found["eigenvalues"]) == 7
    hessian = torch.tensor(found["hessian"], dtype=torch.float64)
    torch.testing.assert_close(hessian, hessian.T)
    shown = run(*base, "--samples", 4, "--json", "--force")
    assert json.loads(shown.stdout)["curvature"] in ("exact", "gauss-newton")
    assert run(*base).returncode == 6
    refused = run(*base, "--mixtures", "last,swa", "--force")
    assert refused.returncode == 2 and "--mixtures takes three strategies" in refused.stderr
