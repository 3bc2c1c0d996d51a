"""Intervals of differences against scipy's, their symmetries, the rule of ten, and coverage in a seeded simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from scipy.stats import skew, ttest_1samp, ttest_ind
from torch import Tensor

from ckptavg.report.interval import _corrected, gain  # pyright: ignore[reportPrivateUsage]
from ckptavg.report.result import Gain
from ckptavg.score import PerExample, Score


def score(values: Tensor, counts: Tensor | None = None, *, order: int = 0) -> Score:
    counts = torch.ones_like(values) if counts is None else counts
    value = float((values * counts).sum() / counts.sum())
    each = PerExample(values_U=values, examples_U=counts, order=order)
    return Score(value=value, loss=-value, metric=value, examples=int(counts.sum()), per_example=each)


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flips(better: int, worse: int, of: int) -> tuple[Score, Score]:
    """Two models that are right on half of the examples, but for these."""
    one = (torch.arange(of) % 2).double()
    other = one.clone()
    one[:better], other[:better] = 1.0, 0.0
    one[of - worse :], other[of - worse :] = 0.0, 1.0
    return score(one), score(other)


def ends(found: Gain) -> tuple[float, float]:
    assert found.low is not None and found.high is not None and not found.reason
    return found.low, found.high


def test_an_interval_of_symmetric_differences_is_students():
    d = normal(40, 0)
    d = torch.cat([d, -d]) + 0.1  # no skewness
    found = gain(score(d), score(torch.zeros_like(d)))
    theirs = ttest_1samp(d.numpy(), 0).confidence_interval()
    assert ends(found) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    assert found.value == pytest.approx(0.1) and (found.units, found.unit, found.paired) == (80, "examples", True)


def test_an_interval_extends_by_halls_correction_on_the_longer_tail():
    """Ends solve x + a x²/3 + a² x³/27 + a/6 = ±t, where x = (m − μ)/s; the nearer end is Student's."""
    d = normal(60, 1).exp()
    found = gain(score(d), score(torch.zeros_like(d)))
    theirs = ttest_1samp(d.numpy(), 0).confidence_interval()
    spread, t = float(d.std()) / 60**0.5, (theirs.high - theirs.low) / 2 / (float(d.std()) / 60**0.5)
    low, high = ends(found)
    a = float(skew(d.numpy())) * (59 / 60) ** 1.5 / 60**0.5  # scipy divides by the biased variance
    x = (found.value - high) / spread
    assert low == pytest.approx(theirs.low) and high > theirs.high
    assert x + a * x**2 / 3 + a**2 * x**3 / 27 + a / 6 == pytest.approx(-t)


def test_a_small_skewness_is_continuous_with_none():
    for a in (2e-6, -2e-6, 2e-5, -2e-5):
        assert _corrected(2.0, a) == pytest.approx(2.0, abs=3 * abs(a))  # x = t − a (t²/3 + 1/6) + O(a²)


def test_scores_of_unpaired_examples_have_welchs_interval():
    d = normal(40, 2)
    one, other = torch.cat([d, -d]) + 1.0, 3 * torch.cat([d, -d]).flip(0)
    found = gain(score(one), score(other, order=1))
    theirs = ttest_ind(one.numpy(), other.numpy(), equal_var=False).confidence_interval()
    assert ends(found) == pytest.approx((theirs.low, theirs.high), rel=1e-9) and not found.paired


@pytest.mark.parametrize("order", [0, 1])
def test_the_opposite_difference_has_the_opposite_interval(order: int):
    one, other = normal(50, 3).exp(), normal(50, 4)
    low, high = ends(gain(score(one), score(other, order=order)))
    assert ends(gain(score(other, order=order), score(one))) == pytest.approx((-high, -low), rel=1e-12)


def test_units_are_weighted_by_their_examples():
    """The variance of Σ w d / Σ w as that of a ratio, with 1000 units of 1 to 4 examples."""
    d, w = normal(1000, 5) + 1.0, (torch.arange(1000) % 4 + 1).double()
    found = gain(score(d, w), score(torch.zeros_like(d), w))
    residual = w * (d - found.value)
    half = 1.9623 * float(residual.std()) * 1000**0.5 / float(w.sum())  # t of 999 degrees of freedom
    low, high = ends(found)
    assert found.value == pytest.approx(float((w * d).sum() / w.sum()))
    # Hall's correction adds up to t²/3 + 1/6 times the skewness of the mean, here of less than 0.01
    assert found.value - low == pytest.approx(half, rel=0.01) and high - found.value == pytest.approx(half, rel=0.01)


@pytest.mark.parametrize(
    ("better", "worse", "of", "reason"),
    [
        (4, 0, 400, "4 of 400 examples differ"), (5, 4, 400, "9 of 400 examples differ"), (5, 5, 400, ""),
        (0, 0, 400, "0 of 400 examples differ"), (5, 4, 9, "only 9 of the 10 examples needed"), (5, 5, 10, ""),
    ],
)  # fmt: skip
def test_fewer_than_ten_differing_examples_give_a_reason_and_no_interval(better: int, worse: int, of: int, reason: str):
    found = gain(*flips(better, worse, of))
    assert found.reason == reason and found.value == pytest.approx((better - worse) / of)
    assert (found.low is None) == (found.high is None) == bool(reason)
    assert not found.separated and str(found).endswith(f"(no interval: {reason})" if reason else "]")


@pytest.mark.parametrize("order", [0, 1])
def test_rounding_is_no_difference(order: int):
    """Losses from 1e-9 to 10 that are all 6e-8 (half a unit in the last place of 1) larger, or 6e-8 of themselves."""
    losses = torch.logspace(-9, 1, 500, dtype=torch.float64) if order == 0 else torch.ones(500, dtype=torch.float64)
    for rounded in (losses + 6e-8, losses * (1 + 6e-8)):
        found = gain(score(-rounded), score(-losses, order=order))
        assert found.reason.startswith("0 of ") and not found.separated
    assert gain(score(-losses - 6e-6), score(-losses)).separated  # 2**-20 of the mean, 0.43, or of 10 is less


def test_unpaired_answers_need_ten_that_are_not_the_usual_one():
    few, more = ((torch.arange(400) >= wrong).double() for wrong in (4, 6))
    assert gain(score(few), score(more, order=1)).low is not None
    assert gain(score(few), score(few, order=1)).reason == "8 of 800 examples differ"


def test_a_score_without_values_has_no_interval():
    bare = Score(value=0.5, loss=None, metric=0.5, examples=None)
    assert gain(bare, bare) == Gain(value=0.0, reason="no values per example")


def whole(means: Tensor, order: int = 0) -> Score:
    """A metric of the corpus that is the mean of those of equal batches of 8 examples."""

    def resampled(chosen: Sequence[int]) -> float:
        return float(means[list(chosen)].mean())

    losses = PerExample(values_U=torch.zeros(8 * len(means)), examples_U=torch.ones(8 * len(means)), order=order)
    return Score(
        value=float(means.mean()), loss=0.0, metric=0.0, examples=8 * len(means), per_example=losses,
        resampled=resampled, batches=len(means),
    )  # fmt: skip


@pytest.mark.parametrize("order", [0, 1])
def test_a_metric_of_a_corpus_that_is_a_mean_has_the_interval_of_the_mean(order: int):
    """A pseudo-value of a mean of equal batches is the batch's own value."""
    one, other = normal(30, 6).exp(), normal(30, 7)
    found = gain(whole(one), whole(other, order))
    assert ends(found) == pytest.approx(ends(gain(score(one), score(other, order=order))), rel=1e-9)
    assert (found.units, found.unit, found.paired) == (30, "groups of batches", not order)
    assert gain(whole(one[:9]), whole(other[:9])).reason == "only 9 of the 10 groups of batches needed"
    same = other.clone()
    same[:9] += 1.0  # single precision is not a difference
    assert gain(whole(same), whole((other.float() + 0.0).double())).reason == "9 of 30 groups of batches differ"


def test_a_metric_of_a_corpus_is_recomputed_at_most_a_hundred_times():
    calls: list[int] = []
    base = whole(normal(1000, 8))

    def counted(chosen: Sequence[int]) -> float:
        calls.append(len(chosen))
        assert base.resampled is not None
        return base.resampled(chosen)

    found = gain(replace(base, resampled=counted), whole(normal(1000, 9)))
    assert calls == [990] * 100 and found.units == 100 and found.low is not None


def accurate(draws: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Answers of models with accuracies of 0.97 and 0.96; the percentile bootstrap had intervals [0, 0]."""
    x, y = torch.rand(2, 4000, 100, generator=draws, dtype=torch.float64)
    return (x < 0.97).double(), (y < 0.96).double(), 0.01


def skewed(draws: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Losses e^x of hard and easy examples, of which one model has 0.7 times as much; that bootstrap covered 90 %."""
    x, e, f = torch.randn(3, 2000, 100, generator=draws, dtype=torch.float64)
    return -(x + 0.3 * e - 0.045).exp(), -0.7 * (x + 0.3 * f - 0.045).exp(), -0.3 * 1.6487212707  # e^½


@pytest.mark.parametrize("case", [accurate, skewed])
def test_the_95_percent_interval_covers_95_percent(case: Callable[[torch.Generator], tuple[Tensor, Tensor, float]]):
    one, other, truth = case(torch.Generator().manual_seed(0))
    found = [gain(score(a), score(b)) for a, b in zip(one, other, strict=True)]
    shown = [(each.low, each.high) for each in found if each.low is not None and each.high is not None]
    assert all(low < high for low, high in shown) and len(shown) > 400
    assert 0.92 < sum(low <= truth <= high for low, high in shown) / len(shown) < 0.98


def test_a_million_examples_take_less_than_two_seconds():
    import time

    one, other = score((normal(10**6, 10) > 0).double()), score((normal(10**6, 11) > 0.01).double(), order=1)
    start = time.process_time()
    gain(one, other)
    assert time.process_time() - start < 2.0  # 2000 resamples are 2·10⁹ draws
