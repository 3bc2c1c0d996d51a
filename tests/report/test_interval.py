"""Paired bootstrap, compared with scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from torch import Tensor

from ckptavg.report.bootstrap import gain
from ckptavg.score import PerExample, Score


def score(values: Tensor, counts: Tensor | None = None) -> Score:
    counts = torch.ones_like(values) if counts is None else counts
    value = float((values * counts).sum() / counts.sum())
    each = PerExample(values_U=values, examples_U=counts)
    return Score(value=value, loss=-value, metric=value, examples=int(counts.sum()), per_example=each)


def hits(rate: float, n: int, seed: int) -> Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < rate).double()


@pytest.mark.parametrize(("n", "shift"), [(40, 0.0), (400, 0.05), (400, 0.2)])
def test_interval_matches_scipy(n: int, shift: float):
    a, b = hits(0.7 + shift, n, 1), hits(0.7, n, 2)
    found = gain(score(a), score(b))
    theirs = bootstrap(
        ((a - b).numpy(),), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    spread = theirs.high - theirs.low
    # 2000 resamples leave about 2 % of the width to chance at either end
    assert found.low == pytest.approx(theirs.low, abs=0.08 * spread)
    assert found.high == pytest.approx(theirs.high, abs=0.08 * spread)
    assert found.value == pytest.approx(float((a - b).mean()), abs=1e-12) and found.units == n
    assert found.separated == (found.low > 0 or found.high < 0)


def test_pairs_the_same_examples():
    """Two scores with a large variance and a small constant difference are separated."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gain(score(values + 0.01), score(values))
    assert found.separated and found.low == pytest.approx(0.01) == found.high
    assert not gain(score(values), score(values)).separated


def test_units_are_weighted_by_their_examples():
    values, counts = torch.eye(20).double()[0], torch.ones(20).double()
    counts[0] = 981
    found = gain(score(values, counts), score(torch.zeros(20).double(), counts))
    assert found.value == 0.981 and found.low == 0.0 and 0.99 < (found.high or 0) <= 1.0


def test_is_deterministic_and_bounds_memory(monkeypatch: pytest.MonkeyPatch):
    a, b = (score(torch.randn(30, generator=torch.Generator().manual_seed(i)).double()) for i in (1, 2))
    whole = gain(a, b, seed=3)
    monkeypatch.setattr("ckptavg.report.bootstrap._AT_ONCE", 100)
    assert gain(a, b, seed=3) == whole != gain(a, b, seed=4)


def test_examples_in_a_different_order_are_not_paired():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = score(values + 0.01), score(values.flip(0))
    assert other.per_example is not None
    found = gain(one, replace(other, per_example=replace(other.per_example, order=1)))
    assert not found.paired and not found.separated and found.low is not None and found.low < -0.1
    assert gain(one, one).paired


def test_no_interval_for_few_units():
    found = gain(score(torch.ones(19).double()), score(torch.zeros(19).double()))
    assert (found.value, found.low, found.high) == (1.0, None, None) and not found.separated
