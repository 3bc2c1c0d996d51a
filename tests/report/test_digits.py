"""Decimals that noise allows: the Particle Data Group's rule for errors, two digits of an interval's half width."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
import torch

from ckptavg.pipeline.verdict import figure
from ckptavg.report.digits import figure_column, figure_places, gain_places, places
from ckptavg.report.result import Gain
from ckptavg.score import PerExample, Score, standard_error


def answers(right: int, of: int = 400, loss: float = 0.5) -> Score:
    """Return the score of a model with so many right answers."""
    values_U = torch.zeros(of, dtype=torch.float64)
    values_U[:right] = 1.0
    each = PerExample(values_U=values_U, examples_U=torch.ones_like(values_U))
    return Score(value=right / of, loss=loss, metric=right / of, examples=of, per_example=each, loss_noise=0.0071)


def published(error: str) -> int:
    """Return the decimals by the text of the rule, in decimal arithmetic."""
    value = Decimal(error)
    exponent = value.adjusted()
    three = int(value.scaleb(2 - exponent).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))
    two = 100 <= three <= 354
    return max(0, -exponent + 1) if two else max(0, -exponent)  # 950 to 999: 1000, of which two digits are 10


@pytest.mark.parametrize(
    ("error", "decimals"),
    [("0.0112", 3), ("0.0354", 3), ("0.0355", 2), ("0.0949", 2), ("0.0950", 2), ("0.0008", 4), ("0.827", 1), ("3", 1),
     ("7", 0), ("0.00012", 5), ("120", 0)],
)  # fmt: skip
def test_an_error_leaves_the_decimals_of_the_published_rule(error: str, decimals: int):
    assert places([float(error)]) == published(error) == decimals


def test_the_rule_holds_for_errors_of_any_size():
    for i in range(-600, 300):
        error = f"{10 ** (i / 100):.12g}"
        assert places([float(error)]) == min(published(error), 8), error


def test_unknown_errors_leave_four_decimals_and_one_known_error_is_enough():
    assert places([]) == places([math.inf, 0.0]) == 4
    assert places([math.inf, 0.011, 0.0]) == 3


def test_values_that_would_look_alike_have_more_decimals():
    close = [2.34512, 2.34508, 2.34431, 2.34566]
    assert places([0.03] * 4, close) == 3 and len({f"{value:.3f}" for value in close}) == 3
    assert places([0.03] * 2, [2.3451, 2.3459]) == 3
    assert places([0.03] * 2, [2.34512, 2.34518]) == 4
    assert places([0.03] * 3, [0.9475] * 3) == 3  # equal ones are alike with any number


def test_a_column_has_one_number_of_decimals_and_its_error_below():
    scores = [answers(379), answers(344), None, answers(384)]
    cells, error = figure_column(scores, "metric")
    assert cells == ["0.948", "0.860", "", "0.960"] and error == "±0.011"
    values_U = torch.tensor([1.0] * 379 + [0.0] * 21, dtype=torch.float64)
    assert error == f"±{standard_error(values_U, torch.ones_like(values_U)):.3f}"
    assert figure_column(scores, "loss")[0][0] == "0.500"
    assert figure_column([replace(answers(379), per_example=None)], "metric") == (["0.9475"], "")
    assert figure_places([None], "metric") == 4


def test_an_interval_keeps_two_digits_of_half_its_width():
    assert str(Gain(value=0.0975, low=0.0644, high=0.1328)) == "+0.098 [+0.064, +0.133]"
    assert str(Gain(value=0.00153, low=0.00112, high=0.00194)) == "+0.00153 [+0.00112, +0.00194]"
    assert str(Gain(value=0.0975)) == "+0.0975"
    assert str(Gain(value=1.0, low=1.0, high=1.0)) == "+1.0000 [+1.0000, +1.0000]"


def test_an_interval_that_excludes_zero_shows_it():
    gain = Gain(value=0.03, low=0.0004, high=0.0604)
    assert gain.separated and str(gain) == "+0.0300 [+0.0004, +0.0604]"
    assert str(replace(gain, low=-0.0004)) == "+0.030 [-0.000, +0.060]"
    assert gain_places([gain, Gain(value=0.03, low=0.01, high=0.05)]) == 4


def test_scores_of_one_sentence_differ_in_it():
    assert figure(answers(379), answers(384)) == "metric 0.948"
    close = replace(answers(379), value=0.94751, metric=0.94751), replace(answers(379), value=0.94759, metric=0.94759)
    assert figure(*close) == "metric 0.9475" and figure(*close[::-1]) == "metric 0.9476"
