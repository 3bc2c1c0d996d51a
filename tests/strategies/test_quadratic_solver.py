"""The quadratic solver of SeWA and TWA on quadratic losses and on real networks."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK, Job, Run
from quadratic import Curved, Quadratic, Regression, loss_of, plain, rows_of

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.score import Score
from ckptavg.strategies.sewa import SeWA
from ckptavg.strategies.twa import TWA
from ckptavg.surrogate.subsets import best_subsets


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 3, 9])
def test_the_best_subset_of_a_quadratic_is_found_unless_a_plain_average_is_better(seed: int, k: int):
    objective = Quadratic(n=9, d=6, seed=seed)
    learned = SeWA(k=k, solver="quadratic").learn(objective)
    best = min(itertools.combinations(range(9), k), key=objective.of_subset)
    expected = min([Coefficients.uniform(best, 9), *plain(objective)], key=lambda mixture: loss_of(objective, mixture))
    assert learned.coefficients == expected
    (row,) = rows_of(learned)
    assert row["K"] == k and row["quadratic"] == pytest.approx(objective.of_subset(best), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_auto_takes_the_size_with_the_lowest_held_out_loss(seed: int):
    """Nothing that was scored and no subset of that size is better than the answer."""
    objective = Regression(n=7, examples=40, seed=seed)
    learned = SeWA(k="auto", solver="quadratic").learn(objective)
    rows = rows_of(learned)
    assert [row["K"] for row in rows] == list(range(1, 8))
    k = min(rows, key=lambda row: row["held-out"])["K"]
    subsets = [Coefficients.uniform(mask, 7) for mask in itertools.combinations(range(7), k)]
    answer = loss_of(objective, learned.coefficients)
    assert answer <= min(loss_of(objective, mixture) for mixture in [*subsets, *plain(objective)])
    scored = [row for row in rows if "loss" in row]
    assert k in [row["K"] for row in scored] and answer <= min(row["loss"] for row in scored)
    assert all(row["loss"] == pytest.approx(row["quadratic"]) for row in scored)


@pytest.mark.parametrize("k", [3, "auto"])
@pytest.mark.parametrize("make", [Quadratic, Curved, Regression])
def test_no_answer_is_worse_than_the_mean_or_a_single_candidate(make: Any, k: Any):
    for seed in range(2):
        objective = make(9, 6, seed)
        best = min(loss_of(objective, mixture) for mixture in plain(objective))
        for strategy in (SeWA(k=k, solver="quadratic"), TWA(solver="quadratic", ridge=None if k == "auto" else 1e3)):
            assert loss_of(objective, strategy.learn(objective).coefficients) <= best


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


def test_the_best_real_loss_wins_among_the_verified_and_a_plain_average_among_all():
    """Real scores correct a surrogate whose first choice is wrong."""

    class Wrong(Quadratic):
        def score(self, coefficients: Coefficients, on: Any = None) -> Any:
            score = super().score(coefficients, on)
            wrong = 9 * (coefficients.selected in self.wrong)
            return type(score)(value=score.value - wrong, loss=(score.loss or 0) + wrong, metric=None, examples=1)

    objective = Wrong(n=7, d=24, seed=0)
    ranked = sorted(itertools.combinations(range(7), 3), key=objective.of_subset)
    objective.wrong = ranked[:1]
    assert SeWA(k=3, solver="quadratic").learn(objective).coefficients.selected == ranked[1]
    objective.wrong = ranked
    learned = SeWA(k=3, solver="quadratic").learn(objective)
    assert learned.coefficients == min(plain(objective), key=lambda mixture: loss_of(objective, mixture))
    assert re.search(r"the answer is (a single|the mean of all).*, not an average of 3: loss", " ".join(learned.notes))


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


@pytest.mark.parametrize(
    "strategy",
    [SeWA(k=k, solver="quadratic", verify=verify) for k in (4, "auto") for verify in (1, 12)]
    + [TWA(solver="quadratic"), TWA(solver="quadratic", ridge=0.0)],
)
def test_no_more_gradients_and_scores_are_taken_than_planned(strategy: Any):
    """Where every score is the lowest so far, the quadratic is recentered each time."""
    passes: list[Coefficients] = []
    scored: list[Coefficients] = []

    class Falling(Curved):
        def gradients(self, coefficients: Coefficients, *args: Any) -> Any:
            passes.append(coefficients)
            return super().gradients(coefficients, *args)

        def score(self, coefficients: Coefficients, on: Any = None) -> Any:
            scored.append(coefficients)
            loss = 100.0 - len(scored)
            return Score(value=-loss, loss=loss, metric=None, examples=1)

    objective = Falling(n=9, d=16, seed=2)
    _, planned = strategy.stages(9, objective, "val")
    strategy.learn(objective)
    passes = passes[1:]  # the surrogate's own, which the stage before has
    assert len(passes) * objective.batches("val") <= planned.forward
    assert len(set(scored)) <= planned.scores + 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: SeWA(k="auto"), "--k auto needs --solver quadratic"),
        (lambda: SeWA(verify=0), "--verify must be at least 1"),
        (lambda: TWA(ridge=-0.1), "--ridge must be at least 0"),
    ],
)
def test_invalid_settings_are_refused(settings: Any, message: str):
    with pytest.raises(UsageError, match=message):
        settings()


def test_the_quadratic_solver_needs_a_loss():
    """Without splits of data there are scores alone; see `Strategy.check`."""
    for strategy in (SeWA(solver="quadratic", k=2), TWA(solver="quadratic")):
        with pytest.raises(UsageError, match="needs a loss"):
            strategy.check(4, [], bounded=False)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["cnn", "mlp", "transformer"])
def test_on_networks_the_verified_subset_is_among_the_best(jobs: dict[str, Job], name: str):
    with jobs[name].mixture(last=9) as mixture:
        learned = SeWA(k=4, solver="quadratic", select_by="loss").learn(mixture)
        losses = [
            mixture.score(Coefficients.uniform(mask, 9)).loss or 0.0 for mask in itertools.combinations(range(9), 4)
        ]
        assert (mixture.score(learned.coefficients).loss or 0.0) <= sorted(losses)[2]  # of 126


def test_the_command_line(digits: Path, run: Run, tmp_path: Path):
    done = run("sewa", digits, "--k", 5, "--solver", "quadratic", "--task", TASK, "--last", 12, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    averaged = sum(one["coefficient"] > 0 for one in report["candidates"])
    assert averaged == 5 or (averaged in (1, 12) and "better than every average of 5" in json.dumps(report))
    assert [row["K"] for row in report["tables"]["best subset of each size"]] == [5]
    auto = run("sewa", digits, "--k", "auto", "--solver", "quadratic", "--task", TASK, "--last", 8, "--force")
    assert auto.returncode == 0 and "best subset of each size" in auto.stderr, auto.stderr
    assert run("sewa", digits, "--k", "many", "--task", TASK).returncode == 2
    solved = run("twa", digits, "--solver", "quadratic", "--task", TASK, "--last", 8, "--force")
    assert solved.returncode == 0 and "shrinkage, by held-out loss" in solved.stderr, solved.stderr


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
