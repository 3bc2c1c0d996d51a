"""What every strategy promises, and the small ones by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import Job
from quadratic import Quadratic
from torch.optim.swa_utils import get_ema_avg_fn

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.strategies import from_spec, strategies
from ckptavg.strategies.aswa import ASWA
from ckptavg.strategies.best import Best
from ckptavg.strategies.ema import EMA
from ckptavg.strategies.soup import GreedySoup
from ckptavg.strategies.twa import TWA

ALL = sorted(strategies())


def quick(name: str) -> Any:
    """A strategy with settings that five candidates allow."""
    return from_spec({"sewa": "sewa:k=2:steps=5", "lawa": "lawa:k=2", "twa": "twa:epochs=2"}.get(name, name))


@pytest.mark.parametrize("name", ALL)
def test_rows_sum_to_one_and_repeat_themselves(name: str):
    first, second = (quick(name).learn(Quadratic(n=5, d=4, seed=1)) for _ in range(2))
    assert first == second and first.coefficients.n == 5  # Coefficients themselves refuse rows that do not sum to one
    assert all(len(column) == 5 for column in first.columns.values())


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("sewa", "lawa")])
def test_one_candidate_is_taken_as_it_is(name: str):
    assert quick(name).learn(Quadratic(n=1, d=4, seed=1)).coefficients.values == ((1.0,),)


@pytest.mark.parametrize("name", ALL)
def test_candidates_that_are_all_alike_are_no_trouble(name: str):
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
def test_a_decay_that_is_none_is_refused(decay: float):
    with pytest.raises(UsageError, match="--decay"):
        EMA(decay=decay)


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_soup_is_that_of_the_recipe(seed: int):
    objective = Quadratic(n=7, d=4, seed=seed)
    order = sorted(range(7), key=lambda i: (objective.of_subset([i]), -i))
    soup = order[:1]
    for i in order[1:]:
        if objective.of_subset([*soup, i]) < objective.of_subset(soup):
            soup.append(i)
    learned = GreedySoup().learn(objective)
    assert learned.coefficients.selected == tuple(sorted(soup))
    assert learned.columns["decision"] == ["keep" if i in soup else "reject" for i in range(7)]


def test_the_best_is_the_later_of_equals():
    objective = Quadratic(n=4, d=2, seed=0)
    objective.weights_ND[3] = objective.weights_ND[1] = 0.0
    assert Best().learn(objective).coefficients == Coefficients.uniform([3], 4)


@pytest.mark.parametrize("seed", range(3))
def test_no_selection_on_validation_is_below_the_best_single_candidate(seed: int):
    """True of the soup and of what ASWA ends in by their rules; of ASWA where hard updates are on."""
    objective = Quadratic(n=6, d=3, seed=seed)
    best = objective.score(Best().learn(objective).coefficients).value
    assert objective.score(GreedySoup().learn(objective).coefficients).value >= best
    values = [objective.score(ASWA(hard_updates=hard).learn(objective).coefficients).value for hard in (True, False)]
    assert values[0] >= best and values[1] >= objective.score(Coefficients.uniform([0], 6)).value


@pytest.mark.parametrize("n", [2, 5])
def test_the_optimum_of_the_simplex_is_not_beaten_by_any_subset(n: int):
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
        ("twa:rate=1", "no setting 'rate'"),
        ("twa:lr=fast", "lr cannot be 'fast'"),
        ("twa:on=test", "on cannot be 'test'"),
        ("twa:layerwise=maybe", "layerwise cannot be 'maybe'"),
        ("ema:decay", "decay cannot be ''"),
        ("ema:decay=2", "--decay must be"),
        ("", "no strategy ''"),
    ],
)
def test_a_specification_that_means_nothing_is_refused(spec: str, message: str):
    with pytest.raises(UsageError, match=message):
        from_spec(spec)
