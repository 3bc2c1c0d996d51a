"""The contract of every strategy, and the small strategies by hand."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Job
from quadratic import Quadratic
from torch.optim.swa_utils import get_ema_avg_fn

import ckptavg.strategies as package
from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.strategies import from_spec, strategies
from ckptavg.strategies.aswa import ASWA
from ckptavg.strategies.best import Best
from ckptavg.strategies.ema import EMA
from ckptavg.strategies.soup import GreedySoup
from ckptavg.strategies.twa import TWA

ALL = sorted(strategies())


def test_the_strategies_are_the_modules_that_define_one():
    files = Path(next(iter(package.__path__))).glob("*.py")
    assert {
        file.stem for file in files if re.search(r"\nclass \w+\((Strategy|PlainAverage)\):", file.read_text())
    } == set(ALL)


def quick(name: str) -> Any:
    """Return a strategy with settings valid for five candidates."""
    return from_spec({"sewa": "sewa:k=2:steps=5", "lawa": "lawa:k=2", "twa": "twa:epochs=2"}.get(name, name))


@pytest.mark.parametrize("name", ALL)
def test_rows_sum_to_one_and_are_reproducible(name: str):
    first, second = (quick(name).learn(Quadratic(n=5, d=4, seed=1)) for _ in range(2))
    assert first == second and first.coefficients.n == 5  # Coefficients refuses rows that do not sum to one
    assert all(len(column) == 5 for column in first.columns.values())


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("sewa", "lawa")])
def test_a_single_candidate_is_returned(name: str):
    assert quick(name).learn(Quadratic(n=1, d=4, seed=1)).coefficients.values == ((1.0,),)


@pytest.mark.parametrize("name", ALL)
def test_identical_candidates_are_allowed(name: str):
    quick(name).learn(Quadratic(n=5, d=3, seed=0, scale=0.0))


@pytest.mark.parametrize("name", ALL)
def test_a_strategy_runs_on_a_network(jobs: dict[str, Job], name: str):
    with jobs["mlp"].mixture(last=5) as mixture:
        learned = quick(name).learn(mixture)
        score = mixture.score(learned.coefficients)
    assert learned.coefficients.n == 5 and math.isfinite(score.value)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_ema_is_the_recursion_of_torch(decay: float):
    values = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    average, step = values[0], get_ema_avg_fn(decay)
    for i, value in enumerate(values[1:], 1):
        average = step(average, value, torch.tensor(i))
    (row,) = EMA(decay=decay).learn(Quadratic(n=9, d=1, seed=0)).coefficients.values
    assert sum(c * v for c, v in zip(row, values.tolist(), strict=True)) == pytest.approx(float(average), rel=1e-14)


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_out_of_range_is_refused(decay: float):
    with pytest.raises(UsageError, match="--decay"):
        EMA(decay=decay)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_soup_matches_the_recipe(seed: int):
    objective = Quadratic(n=7, d=4, seed=seed)
    order = sorted(range(7), key=lambda i: (objective.of_subset([i]), -i))
    soup = order[:1]
    for i in order[1:]:
        if objective.of_subset([*soup, i]) < objective.of_subset(soup):
            soup.append(i)
    learned = GreedySoup().learn(objective)
    assert learned.coefficients.selected == tuple(sorted(soup))
    assert learned.columns["decision"] == ["keep" if i in soup else "reject" for i in range(7)]


def test_best_takes_the_later_of_ties():
    objective = Quadratic(n=4, d=2, seed=0)
    objective.weights_ND[3] = objective.weights_ND[1] = 0.0
    assert Best().learn(objective).coefficients == Coefficients.uniform([3], 4)


@pytest.mark.parametrize("seed", range(3))
def test_no_selection_on_validation_is_below_the_best_single_candidate(seed: int):
    """Guaranteed by the rules of the soup, and of ASWA with hard updates."""
    objective = Quadratic(n=6, d=3, seed=seed)
    best = objective.score(Best().learn(objective).coefficients).value
    assert objective.score(GreedySoup().learn(objective).coefficients).value >= best
    values = [objective.score(ASWA(hard_updates=hard).learn(objective).coefficients).value for hard in (True, False)]
    assert values[0] >= best and values[1] >= objective.score(Coefficients.uniform([0], 6)).value


@pytest.mark.parametrize("n", [2, 5])
def test_no_subset_beats_the_simplex_optimum(n: int):
    objective = Quadratic(n=n, d=6, seed=9)
    learned = TWA(constraint="simplex", epochs=400, lr=0.1).learn(objective).coefficients
    subsets = itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(1, n + 1))
    assert -objective.score(learned).value <= min(map(objective.of_subset, subsets)) + 1e-6


def test_a_specification_is_a_name_and_settings():
    assert from_spec("twa:on=train:lr=0.5:layerwise:block-size=7:clip=2") == TWA(
        on="train", lr=0.5, layerwise=True, block_size=7, clip=2.0
    )
    assert from_spec("aswa:hard_updates=false") == ASWA(hard_updates=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("swaa", "no strategy 'swaa'"),
        ("twa:rate=1", "twa has no setting 'rate'"),
        ("twa:lr=fast", "lr cannot be 'fast'"),
        ("twa:on=test", "on cannot be 'test'"),
        ("twa:layerwise=maybe", "layerwise cannot be 'maybe'"),
        ("ema:decay", "decay cannot be ''"),
        ("ema:decay=2", "--decay must be"),
        ("", "no strategy ''"),
    ],
)
def test_an_invalid_specification_is_refused(spec: str, message: str):
    with pytest.raises(UsageError, match=message):
        from_spec(spec)


@pytest.mark.parametrize("spec", ["swa", "lawa:k=2", "ema:decay=0.5", "wsm:decay=cosine"])
def test_by_run_is_the_mean_of_the_averages_of_the_runs(spec: str):
    runs = [0, 2, 0, 1, 2, 0, 1, 2, 2]  # in training order, as several directories are read
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0, 5.0]
    plain: Any = from_spec(spec)
    averages = []
    for run in range(3):
        own = [value for value, its in zip(values, runs, strict=True) if its == run]
        averages.append(math.fsum(c * v for c, v in zip(plain.coefficients(len(own)).values[0], own, strict=True)))
    objective = Quadratic(n=9, d=2, seed=0)
    objective.runs = runs
    learned = from_spec(f"{spec}:by_run").learn(objective)
    (row,) = learned.coefficients.values
    assert math.fsum(c * v for c, v in zip(row, values, strict=True)) == pytest.approx(sum(averages) / 3, abs=1e-14)
    assert learned.columns == {"run": ["1", "3", "1", "2", "3", "1", "2", "3", "3"]}


@pytest.mark.parametrize("spec", ["swa", "lawa:k=2", "ema:decay=0.5", "wsm:decay=cosine"])
def test_by_run_of_one_run_is_the_plain_strategy(spec: str):
    assert from_spec(f"{spec}:by_run").learn(Quadratic(n=5, d=2, seed=0)) == from_spec(spec).learn(
        Quadratic(n=5, d=2, seed=0)
    )
