"""A score stops early only if the remaining examples cannot lift it to the threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.errors import TaskError
from ckptavg.objective.score_accumulator import ScoreAccumulator
from ckptavg.runtime.workers import Workers
from ckptavg.score import Score, differs
from ckptavg.tasks.probabilities import GOALS


@pytest.mark.parametrize(
    ("loss", "dtype", "expected"),
    [(11.0, torch.bfloat16, False), (11.05, torch.bfloat16, False), (11.05, torch.float32, True),
     (11.5, torch.bfloat16, True)],
)  # fmt: skip
def test_copies_of_a_model_differ_by_more_than_its_own_rounding(loss: float, dtype: torch.dtype, expected: bool):
    """A bfloat16 loss of 11 is a multiple of 1/16."""
    scores: list[Score] = []
    for value in (11.0, loss):
        tally = ScoreAccumulator("max", None)
        for _ in range(4):
            tally.add(torch.full((8,), value), None, 8)
        scores.append(tally.score("it", "val"))
    assert differs(*scores, torch.finfo(dtype).eps) is expected


units = st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), min_size=1, max_size=8)


@settings(deadline=None, max_examples=300)
@given(units, st.sampled_from(["max", "min"]), st.booleans(), st.data())
def test_cannot_reach_implies_that_the_finished_score_is_below_the_bar(
    passes: list[list[float]], goal: str, whole: bool, data: st.DataObject
):
    """Hold for any metrics within the bounds, including bars one rounding error away from the score."""
    total = sum(map(len, passes))

    def run(bar: float | None) -> tuple[ScoreAccumulator, bool]:
        tally, stopped = ScoreAccumulator(goal, (0.0, 1.0)), False
        for metrics in passes:
            values = torch.tensor(metrics)
            tally.add(torch.zeros(()), values.double().mean() if whole else values, len(metrics))
            stopped = stopped or (bar is not None and tally.cannot_reach(bar, total))
        return tally, stopped

    value = run(None)[0].score("it", "val").value
    near = [value, math.nextafter(value, 2), math.nextafter(value, -2), value + 0.1, value - 0.1]
    bar = data.draw(st.sampled_from(near))
    stopped = run(bar)[1]
    if stopped:
        assert value < bar
    if bar > value + 1e-6:
        assert stopped  # at the latest after the last batch


def test_cannot_reach_is_true_as_early_as_possible():
    tally = ScoreAccumulator("max", (0.0, 1.0))
    stops: list[bool] = []
    for _ in range(4):  # the score can still reach 3/4, 2/4, 1/4, 0
        tally.add(torch.zeros(25), torch.zeros(25), 25)
        stops.append(tally.cannot_reach(0.6, 100))
    assert stops == [False, True, True, True]


@pytest.mark.parametrize(
    ("goal", "key", "name", "reached"),
    [
        ("max", None, "metric", [False, True]),
        ({"a": "max"}, None, "a", [False, True]),
        ("min", "a", "a", [False, True]),
        ("max", "accuracy", "accuracy", [False, True]),
        ("max", "nll", "nll", [False, True]),
        ("max", "ece", "ece", [False, False]),
        ({"ece": "max"}, None, "ece", [False, True]),
    ],
)
def test_a_rank_without_batches_stops_when_the_others_do(goal: Any, key: str | None, name: str, reached: list[bool]):
    sums: list[torch.Tensor] = []

    @dataclass(frozen=True)
    class Rank(Workers):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            sums.append(values)
            return sum(sums[-1 if self.rank == 0 else -2 :], torch.zeros_like(values))

    first, second = (ScoreAccumulator(goal, (0.0, 1.0), Rank(rank=i, world_size=2), key=key) for i in range(2))
    stops: list[tuple[bool, bool]] = []
    # the worst values: a score from 0 to 1 can still reach 1/2, then 0, and one from -1 to 0 can reach -1/2, then -1
    worst, threshold = (1.0, -0.6) if goal == "min" or name == "nll" else (0.0, 0.4)
    for _ in range(2):
        values_B = {name: torch.full((50,), worst)}
        predicted = key in GOALS
        first.add(torch.zeros(50), None if predicted else values_B, 50, predicted=values_B if predicted else None)
        stops.append((first.cannot_reach(threshold, 100), second.cannot_reach(threshold, 100)))
    assert stops == [(stop, stop) for stop in reached]
    assert len(sums) == 4  # each rank takes part in each exchange


def test_a_metric_outside_its_bounds_is_an_error():
    tally = ScoreAccumulator("max", (0.0, 1.0))
    tally.add(torch.zeros(2), torch.tensor([0.5, 1.5]), 2)
    with pytest.raises(TaskError, match=r"metric gave 1\.5, outside metric_bounds \(0\.0, 1\.0\)"):
        tally.cannot_reach(0.5, 10)
    with pytest.raises(TaskError, match="metric_bounds"):
        tally.score("it", "val")


def test_a_batch_mean_is_weighted_by_its_examples():
    tally = ScoreAccumulator("max", None)
    tally.add(torch.tensor(1.0), torch.tensor(1 / 3, dtype=torch.float64), 3)
    tally.add(torch.tensor(4.0), torch.tensor(1.0), 1)
    score = tally.score("it", "val")
    assert score.loss == (3 * 1 + 4) / 4 and score.metric == 0.5 and score.per_example is not None
    assert score.per_example.examples_U.tolist() == [3, 1] and score.per_example.values_U.tolist() == [
        pytest.approx(1 / 3),
        1,
    ]


@pytest.mark.parametrize("value", ["text", torch.ones(3), torch.tensor(1j), None])
def test_a_loss_that_is_not_numeric_is_an_error(value: object):
    with pytest.raises(TaskError, match=r"loss\(\) must return a scalar or one real number per example \[2\]"):
        ScoreAccumulator("max", None).add(value, None, 2)
