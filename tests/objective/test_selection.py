"""The choice among scored mixtures by loss or by metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from quadratic import Quadratic
from scipy.stats import spearmanr

from ckptavg.coefficients import Coefficients
from ckptavg.objective import SelectBy
from ckptavg.objective.selection import Selection, spearman
from ckptavg.score import PerExample, Score, Split

N = 6
SWA = Coefficients.uniform(range(N), N)
PAIR = Coefficients.uniform([0, 1], N)
TRIPLE = Coefficients.uniform([0, 1, 2], N)


class Table(Quadratic):
    """Scores from a table of (metric, loss)."""

    def __init__(self, table: Mapping[Coefficients, tuple[float, float]]) -> None:
        super().__init__(n=N, d=2, seed=0)
        self.table = table

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        metric, loss = self.table[coefficients]
        return Score(value=metric, loss=loss, metric=metric, examples=1, name="accuracy")


def chosen(table: Mapping[Coefficients, tuple[float, float]], select_by: SelectBy) -> tuple[Coefficients, str]:
    selection = Selection(Table(table), select_by)
    selection.score(table)
    best = selection.best()
    return best, selection.note(best)


def singles(*pairs: tuple[float, float]) -> dict[Coefficients, tuple[float, float]]:
    return dict(zip(Coefficients.singles(N), pairs, strict=True))


AGREEING = singles(*((0.5 + 0.05 * i, 2 - 0.1 * i) for i in range(N)))
OPPOSED = singles(*((0.5 + 0.05 * i, 2 + 0.1 * i) for i in range(N)))


def test_auto_goes_by_the_metric_where_the_loss_ranks_otherwise_and_says_so():
    table = OPPOSED | {PAIR: (0.9, 3.0), TRIPLE: (0.4, 1.0)}
    by_metric, note = chosen(table, "auto")
    assert by_metric == PAIR and note.startswith("chosen by accuracy") and "does not rank" in note
    assert chosen(table, "loss")[0] == TRIPLE and chosen(table, "metric")[0] == PAIR


def test_auto_goes_by_the_loss_where_both_agree():
    table = AGREEING | {PAIR: (0.8, 1.0), TRIPLE: (0.81, 1.1)}
    best, note = chosen(table, "auto")
    assert best == PAIR and note.startswith("chosen by loss among 8") and chosen(table, "metric")[0] == TRIPLE


def test_auto_prefers_what_is_not_below_a_plain_average_by_the_metric_if_its_loss_is_close():
    """By loss alone the pair is the lowest, but a single candidate has a better metric."""
    table = AGREEING | {SWA: (0.7, 1.6), PAIR: (0.74, 1.0), TRIPLE: (0.76, 1.009)}
    best, note = chosen(table, "auto")
    assert chosen(table, "loss")[0] == PAIR and best == TRIPLE
    assert note.startswith("chosen by loss, of those whose accuracy is at least that of every plain average, among 9")
    assert chosen(table | {TRIPLE: (0.76, 1.2)}, "auto")[0] == PAIR
    lowest = Coefficients.uniform([0], N)  # a plain average, with a poor metric: then any loss will do
    assert chosen(table | {lowest: (0.5, 0.9), TRIPLE: (0.76, 1.2)}, "auto")[0] == TRIPLE
    assert chosen(table | {lowest: (0.5, 0.9), TRIPLE: (0.7, 1.2)}, "auto")[0] == lowest


@pytest.mark.parametrize(("wrong", "expected"), [(5, PAIR), (2, SWA)])
def test_by_metric_auto_prefers_the_mean_unless_another_is_better_by_more_than_noise(
    wrong: int, expected: Coefficients
):
    """Compare over 20 examples: the pair has the last one wrong, the mean as many of the first ones."""
    selection = Selection(Table(OPPOSED | {PAIR: (0.95, 3.0), SWA: (1 - wrong / 20, 0.5), TRIPLE: (0.4, 1.0)}))
    right_U = torch.ones(20, dtype=torch.float64)
    units = {PAIR: right_U.clone(), SWA: right_U.clone()}
    units[PAIR][-1], units[SWA][:wrong] = 0, 0
    selection.score(selection.plain)
    selection.score([PAIR, TRIPLE])
    for mixture, values_U in units.items():
        each = PerExample(values_U=values_U, examples_U=right_U)
        selection.scores[mixture] = replace(selection.scores[mixture], per_example=each)
    assert selection.by == "metric" and selection.best() == expected
    assert ("by less than its standard error" in selection.note(selection.best())) == (expected == SWA)
    selection.scores[PAIR] = replace(selection.scores[PAIR], loss=0.4)
    assert selection.best() == PAIR  # better in both


@pytest.mark.parametrize(("right", "expected"), [(100, PAIR), (77, TRIPLE)])
def test_a_metric_that_is_clearly_better_overrules_a_loss_that_ranks_the_poor_ones_alike(
    right: int, expected: Coefficients
):
    """Compare over 100 examples: the triple has the lowest loss and 70 right; 30 more are clear, 7 more are noise."""
    table = AGREEING | {TRIPLE: (0.7, 0.9), PAIR: (right / 100, 1.0)}
    selection = Selection(Table(table))
    selection.score(table)
    for mixture, count in ((TRIPLE, 70), (PAIR, right)):
        each = PerExample(values_U=(torch.arange(100) < count).double(), examples_U=torch.ones(100).double())
        selection.scores[mixture] = replace(selection.scores[mixture], per_example=each)
    assert selection.best() == expected
    note = selection.note(expected)
    assert note.startswith("chosen by accuracy") == (expected == PAIR) == ("standard errors below the best" in note)
    assert "the loss ranks them like accuracy (Spearman 0." in note


def test_few_mixtures_do_not_tell_whether_the_loss_agrees():
    best, note = chosen({PAIR: (0.9, 3.0), TRIPLE: (0.4, 1.0)}, "auto")
    assert best == PAIR and "too few" in note


@pytest.mark.parametrize("b", [[1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 1.0, 2.0], [1.0, 9.0, 9.0, 2.0]])
def test_rank_correlation_is_scipys(b: list[float]):
    a = [1.0, 2.0, 2.0, 5.0]
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_the_note_counts_one_mixture_in_the_singular():
    selection = Selection(Quadratic(n=2, d=1, seed=0))
    selection.scores = {Coefficients.uniform([0], 2): Score(value=0.5, loss=1.0, metric=0.5, examples=10)}
    assert "among 1 scored mixture: too few" in selection.note()
