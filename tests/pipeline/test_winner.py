"""The choice between strategies: by held-out loss, loss or metric, and the sentences on what was passed over."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from quadratic import Quadratic

from ckptavg.coefficients import Coefficients
from ckptavg.cost import Cost
from ckptavg.objective import Learned
from ckptavg.options import Options
from ckptavg.pipeline.winner import FinishedRun, choose, lower_loss_on_test, verdict_of
from ckptavg.report.result import Gain, StrategyResult
from ckptavg.score import Score
from ckptavg.strategies import from_spec

N = 6
COST = Cost(forward_batches=0, backward_batches=0, evaluations=0, seconds=0.0, epochs=None, epochs_of="val")
OBJECTIVE = Quadratic(N, 3, seed=0)
# losses and accuracies that agree in their order
SINGLES = [Score(value=0.5 + i / 100, loss=1.0 - i / 100, metric=0.5 + i / 100, examples=400) for i in range(N)]


def finished(spec: str, chosen: list[int], loss: float, accuracy: float, held_out: float | None = None) -> FinishedRun:
    score = Score(value=accuracy, loss=loss, metric=accuracy, examples=400, name="accuracy", loss_noise=0.02)
    learned = Learned(coefficients=Coefficients.uniform(chosen, N), held_out=held_out)
    return FinishedRun(name=spec, strategy=from_spec(spec), learned=learned, score=score, cost=COST)


LAST = finished("last", [5], 0.95, 0.55)
SWA = finished("swa", [0, 1, 2, 3, 4, 5], 0.6, 0.70)
SOUP = finished("soup", [1, 2, 3], 0.55, 0.80)
FITTED = finished("twa", [1, 4], 0.40, 0.75, held_out=0.62)
FELL_BACK = finished("twa:solver=quadratic", [2], 0.45, 0.73)  # to a single candidate, which has no held-out loss
BETTER = finished("sewa:k=3", [2, 3, 4], 0.50, 0.72, held_out=0.58)


@pytest.mark.parametrize(
    ("runs", "select_by", "winner", "by"),
    [
        ([LAST, SWA, SOUP], "auto", "soup", "loss"),
        ([LAST, SWA, SOUP, FITTED], "metric", "soup", "metric"),
        ([LAST, SWA, SOUP, FITTED], "auto", "swa", "held-out loss"),  # 0.60 on no choice; soup has none; twa 0.62
        ([LAST, SWA, SOUP, FITTED, BETTER], "auto", "sewa:k=3", "held-out loss"),
        ([LAST, SWA, SOUP, FITTED, BETTER], "loss", "twa", "loss"),  # as it is asked for: the validation loss
        ([LAST, SWA, SOUP, FELL_BACK], "auto", "swa", "held-out loss"),
        ([LAST, SWA, SOUP, FELL_BACK], "loss", "twa:solver=quadratic", "loss"),
    ],
)
def test_the_winner_has_the_best_figure_of_the_kind_that_decides(
    runs: list[FinishedRun], select_by: str, winner: str, by: str
):
    chosen, selected_by, reason = choose(runs, SINGLES, OBJECTIVE, select_by)  # pyright: ignore[reportArgumentType]
    assert (chosen.name, selected_by) == (winner, by)
    mixtures = {*Coefficients.singles(N), *(run.learned.coefficients for run in runs)}
    assert f"among {len(mixtures)} single candidates and answers" in reason
    assert ("Spearman" in reason) == (select_by == "auto")
    assert reason.startswith(f"chosen by {'accuracy' if by == 'metric' else by} ")


@pytest.mark.parametrize("spec", ["twa:solver=quadratic:ridge=1", "twa:solver=quadratic:on=train", "twa"])
def test_a_search_that_does_not_cross_validate_leaves_the_decision_to_the_validation_loss(spec: str):
    searched = replace(FELL_BACK, name=spec, strategy=from_spec(spec))
    chosen, by, _ = choose([LAST, SWA, searched], SINGLES, OBJECTIVE, "auto")  # pyright: ignore[reportArgumentType]
    assert (chosen.name, by) == (spec, "loss")


def test_a_loss_with_one_value_is_not_cross_validated():
    scalar = replace(FELL_BACK, score=replace(FELL_BACK.score, loss_noise=math.inf))
    chosen, by, _ = choose([LAST, SWA, scalar], SINGLES, OBJECTIVE, "auto")  # pyright: ignore[reportArgumentType]
    assert (chosen.name, by) == (scalar.name, "loss")


def test_the_reason_counts_what_was_compared():
    for runs, singles, words in (([LAST], (), "1 answer:"), ([LAST, SWA], (), "2 answers:"), ([LAST], SINGLES, "6 si")):
        _, _, reason = choose(runs, singles, OBJECTIVE, "auto")  # pyright: ignore[reportArgumentType]
        assert f"among {words}" in reason


def test_the_metric_decides_where_the_loss_ranks_the_single_candidates_otherwise():
    against = [replace(score, loss=1.0 - (score.loss or 0.0)) for score in SINGLES]
    chosen, selected_by, reason = choose([LAST, SWA, SOUP, FITTED], against, OBJECTIVE, "auto")  # pyright: ignore
    assert (chosen.name, selected_by) == ("soup", "metric") and "does not rank" in reason


def test_equal_strategies_go_to_the_earlier_one():
    twin = replace(SWA, name="ema")
    chosen, _, _ = choose([LAST, SWA, twin], SINGLES, OBJECTIVE, "loss")  # pyright: ignore[reportArgumentType]
    assert chosen.name == "swa"


def rows(*runs: FinishedRun) -> list[StrategyResult]:
    return [
        StrategyResult(
            name=run.name, strategy=run.name, settings={}, coefficients=(), groups=(("",),), used=1, effective=1.0,
            cost=COST,
            scores={"val": run.score}, held_out=run.held_out, chose_on=None if run in (LAST, SWA) else "val",
            over_last={"val": Gain(value=run.score.value - LAST.score.value)},
        )
        for run in runs
    ]  # fmt: skip


def test_the_verdict_names_what_decided_and_who_was_passed_over():
    table = rows(LAST, SWA, SOUP, FITTED, BETTER)
    text = verdict_of(table, table[4], "held-out loss", "val", Options(task="x"))
    assert text.startswith("sewa:k=3 wins on validation data with held-out loss 0.580 (fitted: 0.500): 0.950 for last")
    assert text.endswith("Passed over on validation data: soup with accuracy 0.8000, twa with loss 0.400.")
    assert "(it was chosen on no data)" in verdict_of(table, table[1], "held-out loss", "val", Options(task="x"))
    by_metric = verdict_of(table, table[2], "metric", "val", Options(task="x"))
    assert by_metric.startswith("soup wins on validation data with accuracy 0.8000: +0.2500 against last on the data")
    assert "Passed over" not in by_metric
    alone = verdict_of(table[:1], table[0], "loss", "val", Options(task="x"))
    assert (
        alone
        == "No strategy scores above the last candidate on validation data by loss, so the last candidate was written."
    )


def test_the_verdict_names_a_test_loss_that_is_lower_than_the_winners_by_more_than_noise():
    table = [replace(row, scores={"test": row.scores["val"]}) for row in rows(LAST, SWA, SOUP, FITTED)]
    text = lower_loss_on_test(table, table[1])
    assert text == " twa has a clearly lower test loss: 0.400, against 0.600."
    assert lower_loss_on_test(table, table[3]) == "" == lower_loss_on_test(rows(LAST, SWA, SOUP), rows(SWA)[0])
    close = [replace(row, scores={"test": replace(row.scores["test"], loss_noise=0.1)}) for row in table]
    assert lower_loss_on_test(close, close[1]) == ""  # 0.2 is less than two standard errors of 0.14
