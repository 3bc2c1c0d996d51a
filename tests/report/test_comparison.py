"""Report of a comparison: the answer first, the figures that decided, and the candidates that matter."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ckptavg.coefficients import Coefficients
from ckptavg.cost import Cost
from ckptavg.errors import decimal
from ckptavg.report import table
from ckptavg.report.comparison import running_table
from ckptavg.report.result import CandidateResult, Comparison, Gain, Output, Result, StrategyResult
from ckptavg.score import Score, Split

COST = Cost(forward_batches=4, backward_batches=2, evaluations=3, seconds=1.0, epochs=None, epochs_of="train", passes=3)
N = 300


def score(value: float) -> Score:
    return Score(value=value, loss=1 - value, metric=value, examples=400, name="accuracy")


def lines(shown: object, width: int = 200) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text().splitlines()


def result(used: int, n: int = N) -> Result:
    """The best single candidate is the 8th; the average is of the first ``used``."""
    candidates = [
        CandidateResult(
            path=Path(f"c/step-{i}.pt"), step=i, coefficient=1 / used if i <= used else 0.0,
            score=score(0.9 if i == 8 else 0.5),
        )
        for i in range(1, n + 1)
    ]  # fmt: skip
    return Result(
        strategy="swa", settings={}, seed=0, candidates=candidates, scores={"val": score(0.8), "test": score(0.7)},
        output=Output(path=Path("best.safetensors"), sha256="ab", bytes=9, dtype="float32"), verdict="Answer.",
    )  # fmt: skip


def row(name: str, value: float, held_out: float | None, chose_on: str | None) -> StrategyResult:
    return StrategyResult(
        name=name, strategy=name, settings={}, coefficients=(), groups=(("",),), used=1, effective=1.0, cost=COST,
        scores={"val": score(value), "test": score(value - 0.1)}, held_out=held_out, chose_on=chose_on,  # pyright: ignore
        over_last={"val": Gain(value=0.1), "test": Gain(value=0.1)},
    )  # fmt: skip


ROWS = [row("last", 0.5, 0.5, None), row("soup", 0.9, None, "val"), row("twa", 0.8, 0.25, "val")]


def comparison(used: int = 5, n: int = N, **more: object) -> Comparison:
    settings = {"winner": "twa", "strategies": ROWS, "selected_by": "held-out loss", "reason": "By loss."} | more
    return Comparison(**vars(result(used, n)), **settings)  # pyright: ignore[reportArgumentType]


def test_the_answer_comes_before_the_tables():
    text = "\n".join(lines(comparison()))
    parts = ["Answer.", "By loss.", "wrote best.safetensors", "strategies", "of 300 candidates"]
    assert sorted(parts, key=text.index) == parts and text.count("wrote best.safetensors") == 1


def test_rows_are_in_the_order_of_the_figure_that_decided_with_those_without_it_last():
    for by, order in (("held-out loss", "twa last soup"), ("loss", "soup twa last"), ("metric", "soup twa last")):
        starts = [line.removeprefix("●").split()[:1] for line in lines(comparison(selected_by=by))]
        assert [name for start in starts for name in start if name in order.split()] == order.split(), by


def test_each_row_shows_the_data_of_its_choice_and_fitted_beside_held_out_loss():
    (heading,) = [line for line in lines(comparison()) if "chose on" in line and "used" in line]
    assert heading.split("  ")[0] == "" and "val loss  held-out loss  test loss  val accuracy  test accuracy" in heading
    (twa,) = [line.split() for line in lines(comparison()) if line.startswith("● twa")]
    assert twa[2:8] == ["val", "0.2000", "0.2500", "0.3000", "0.8000", "0.7000"]
    (last,) = [line.split() for line in lines(comparison()) if line.startswith("  last")]
    assert last[1:4] == ["none", "0.5000", "0.5000"]


def test_the_held_out_loss_is_shown_where_it_decided_though_only_plain_averages_have_one():
    plain = {"strategies": [*ROWS[:2], row("twa", 0.8, None, "val")], "winner": "last"}
    for by, shown in (("held-out loss", True), ("loss", False)):
        (heading,) = [
            line for line in lines(comparison(selected_by=by, **plain)) if "chose on" in line and "used" in line
        ]
        assert ("held-out loss" in heading) == shown


def test_of_many_candidates_the_used_ones_the_best_and_the_last_are_shown():
    shown = [line.split()[0] for line in lines(comparison(used=5)) if line.startswith("step-")]
    assert shown == [f"step-{i}.pt" for i in (1, 2, 3, 4, 5, 8, 300)]
    assert "… and 293 more: --json lists all" in lines(comparison(used=5))
    shown = [line.split()[0] for line in lines(comparison(used=300)) if line.startswith("step-")]
    assert len(shown) == 12 and shown[0] == "step-8.pt" and shown[-1] == "step-300.pt"
    assert len([line for line in lines(comparison(used=5, n=12)) if line.startswith("step-")]) == 12


def test_a_single_strategy_shows_up_to_forty_candidates():
    for n, count in ((40, 40), (41, 7)):
        shown = [line for line in lines(table.render(result(5, n))) if line.startswith("step-")]
        assert len(shown) == count, n


def test_a_single_strategy_shows_its_held_out_loss_beside_the_fitted_one():
    best: dict[Split, Score] = {"val": score(0.9), "test": score(0.6)}
    learned = replace(result(5), strategy="twa", held_out=0.25, baselines={"best": best, "swa": best})
    text = lines(table.render(learned))
    (heading,) = [line for line in text if line.startswith("scores")]
    assert "val loss  held-out loss  test accuracy" in heading
    figures = {line.split()[0]: line.split()[-5:] for line in text if line.startswith(("twa ", "swa ", "best "))}
    assert figures["twa"] == ["0.8000", "0.2000", "0.2500", "0.7000", "0.3000"]
    assert figures["swa"] == ["0.9000", "0.1000", "0.1000", "0.6000", "0.4000"]  # chosen on no data
    assert figures["best"] == ["None)", "0.9000", "0.1000", "0.6000", "0.4000"]
    assert not any("held-out" in line for line in lines(table.render(result(5))))


def test_figures_from_100000_on_have_four_significant_digits():
    huge = Score(value=-1.23456789e12, loss=1.23456789e12, metric=None, examples=4)
    row = replace(ROWS[0], scores={"val": huge}, held_out=None, over_last={"val": Gain(value=-2e9)})
    assert any("1.235e+12" in line for line in lines(comparison(strategies=[row])))
    assert any("1.235e+12" in line for line in lines(table.render(replace(result(5), scores={"val": huge}))))
    assert any("1.235e+12" in line for line in lines(running_table({"twa": {"val loss": 1.23456789e12, "s": 1.0}})))
    assert str(Gain(value=-2e9)) == "-2e+09" and decimal(99999.0) == "99999.0000" and decimal(-0.5, "+") == "-0.5000"


def test_an_average_by_run_is_named_so_beside_the_plain_one():
    best: dict[Split, Score] = {"val": score(0.9), "test": score(0.6)}
    for by_run, expected in ((True, ["swa --by-run", "swa"]), (False, ["swa"])):
        shown = lines(table.render(replace(result(5), settings={"by_run": by_run}, baselines={"swa": best})))
        assert [line.split("  ")[0] for line in shown if line.startswith("swa")] == expected


def test_the_held_out_loss_is_explained_where_it_is_shown_and_absent_where_the_metric_decided():
    text = "\n".join(lines(comparison()))
    assert "held-out loss: validation loss plus the optimism" in text and "folds" not in text
    assert "held-out" not in "\n".join(lines(comparison(selected_by="metric")))
    assert any("plus the optimism" in line for line in lines(table.render(replace(result(5), held_out=0.25))))


def test_the_table_of_finished_strategies_has_a_row_for_each_and_gaps_for_missing_figures():
    rows = {
        "last": {"val loss": 0.5, "passes": 4.0, "s": 0.04},
        "twa": {"val loss": 0.25, "held-out loss": 0.3, "s": 12.0},
    }
    assert [line.split() for line in lines(running_table(rows))] == [
        ["finished", "val", "loss", "held-out", "loss", "passes", "s"],
        ["last", "0.5000", "4", "0.0"],
        ["twa", "0.2500", "0.3000", "12.0"],
    ]


def test_used_shows_the_effective_number_where_few_have_most_of_the_weight():
    heavy = Coefficients(((0.999, *[1e-3 / 299] * 299),))
    collapsed = replace(ROWS[2], used=300, effective=heavy.effective)
    assert any("300 (1/Σβ² 1.0)" in line for line in lines(comparison(strategies=[*ROWS[:2], collapsed])))
    shown = lines(table.render(replace(result(300), effective=heavy.effective)))
    assert "effective number of candidates 1/Σβ²: 1.0 of 300" in shown
    assert Coefficients.uniform(range(3), 8).effective == pytest.approx(3)


def test_negative_coefficients_have_no_effective_number():
    negative = Coefficients(((3.0, -2.5, 0.5),))
    assert negative.effective is None
    without = replace(ROWS[2], used=3, effective=None)
    assert not any("1/Σβ²" in line for line in lines(comparison(strategies=[*ROWS[:2], without])))
