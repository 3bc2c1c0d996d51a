"""Blend against the closed form of a quadratic, with losses and with scores alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from quadratic import Quadratic

from ckptavg.coefficients import Coefficients
from ckptavg.score import Score, Split
from ckptavg.strategies.blend import Blend
from ckptavg.strategies.ema import EMA
from ckptavg.strategies.swa import SWA


class Counted(Quadratic):
    """A quadratic that counts distinct scores, with a metric that counts nothing but what it is given to prefer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scored: set[Coefficients] = set()

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        self.scored.add(coefficients)
        return super().score(coefficients, on)


class ScoresOnly(Counted):
    """The same without losses, as `--score-cmd` has."""

    losses = None

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        score = super().score(coefficients, on)
        return replace(score, loss=None, metric=score.value)


class Opposed(Counted):
    """The metric falls where the loss falls."""

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        score = super().score(coefficients, on)
        return replace(score, value=-score.value, metric=-score.value)


def optimum(objective: Quadratic, start: list[float], end: list[float]) -> float:
    """Return λ of the lowest (λ-quadratic) loss on the line, within the range of the search."""
    a, b = (sum(c * w for c, w in zip(row, objective.weights_ND, strict=True)) for row in (start, end))
    step = b - a
    return min(max(float(-(a @ step) / (step @ step)), -0.5), 1.5)


@pytest.mark.parametrize("objective", [Counted, ScoresOnly])
@pytest.mark.parametrize("seed", range(5))
def test_the_parabola_finds_the_optimum_of_a_quadratic_with_seven_scores(objective: type[Counted], seed: int):
    quadratic = objective(n=6, d=4, seed=seed)
    learned = Blend(anchor="last").learn(quadratic)
    assert len(quadratic.scored) <= 7
    (row,) = learned.coefficients.values
    factor = optimum(quadratic, [0.0] * 5 + [1.0], [1 / 6] * 6)
    assert row[0] * 6 == pytest.approx(factor, abs=1e-6)  # the loss is a parabola: only rounding is left


@pytest.mark.parametrize(
    "settings", [{}, {"anchor": "last"}, {"towards": "lawa"}, {"anchor": "last", "towards": "ema"}]
)
@pytest.mark.parametrize("seed", range(5))
def test_the_answer_is_below_neither_end(settings: dict[str, Any], seed: int):
    quadratic = Quadratic(n=7, d=30, seed=seed)
    value = quadratic.score(Blend(**settings).learn(quadratic).coefficients).value
    singles = [quadratic.score(single).value for single in Coefficients.singles(7)]
    anchor = singles[-1] if "anchor" in settings else max(singles)
    average = {"lawa": Coefficients.uniform(range(2, 7), 7), "ema": EMA().coefficients(7)}
    end = quadratic.score(average.get(settings.get("towards", ""), SWA().coefficients(7))).value
    assert value >= anchor and value >= end


def test_the_metric_decides_where_the_loss_ranks_otherwise():
    notes = Blend().learn(Opposed(n=6, d=4, seed=0)).notes
    by_loss, by_metric = (Blend(select_by=by).learn(Opposed(n=6, d=4, seed=0)) for by in ("loss", "metric"))
    assert Blend().learn(Opposed(n=6, d=4, seed=0)).coefficients == by_metric.coefficients != by_loss.coefficients
    assert any("chosen by metric" in note for note in notes)


def test_the_report_has_every_scored_point_and_the_chosen_one():
    learned = Blend().learn(ScoresOnly(n=6, d=4, seed=0))
    ((title, rows),) = learned.tables.items()
    assert title == "(1 − λ)·best + λ·swa" and {-0.5, 0.0, 0.5, 1.0, 1.5} <= {row["λ"] for row in rows}
    best = max(rows, key=lambda row: float(row["metric"] or 0))
    assert learned.notes[0] == f"λ = {best['λ']:.3g} of {title}"


def test_a_single_candidate_that_becomes_the_best_while_points_are_scored_is_the_answer():
    """Loss and metric agree over the single candidates, whose lowest loss anchors the line, but not on the line."""
    figures = [(0.5, 1.5), (0.55, 1.4), (0.9, 1.3), (0.6, 1.2), (0.7, 1.1), (0.8, 1.0)]
    singles = dict(zip(Coefficients.singles(6), figures, strict=True))

    class Line(Counted):
        def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
            weight = coefficients.values[0][-1]  # of the anchor
            metric, loss = singles.get(coefficients, (0.1 * weight, 0.2 + 0.1 * weight))
            return Score(value=metric, loss=loss, metric=metric, examples=1)

    learned = Blend().learn(Line(n=6, d=2, seed=0))
    assert learned.coefficients.selected == (2,)
    assert learned.notes[0] == "a single candidate, not a point of (1 − λ)·best + λ·swa"
