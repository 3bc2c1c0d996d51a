"""Time estimates: plans against what runs then do, and seconds left against a clock that is set by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import TASK

from ckptavg.options import Options
from ckptavg.pipeline import run
from ckptavg.pipeline.comparison import compare
from ckptavg.runtime import estimate, progress
from ckptavg.runtime.estimate import Estimate, Stage, about
from ckptavg.strategies import from_spec

Report = tuple[str, int, int, Mapping[str, float]]


def options(folder: Path, **more: object) -> Options:
    return Options(task=str(TASK), output=folder / "a.safetensors", last=4, **more)  # pyright: ignore


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say how long a run takes at its first report, however brief it is."""
    monkeypatch.setattr(estimate, "_WARM_UP", 0.0)
    monkeypatch.setattr(progress, "BRIEF", 0.0)
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)


@pytest.mark.parametrize(
    "spec",
    [
        "swa", "best", "soup", "blend", "blend:anchor=last", "aswa", "aswa:hard_updates=false", "sewa:k=2:steps=6",
        "sewa:k=2:solver=quadratic:verify=3", "twa:epochs=2", "twa:epochs=2:sam_rho=0.1", "twa:epochs=2:patience=2",
        "twa:solver=quadratic",
    ],
)  # fmt: skip
def test_the_batches_said_beforehand_bound_those_of_the_run(at_once: None, digits: Path, tmp_path: Path, spec: str):
    reports: list[Report] = []
    result = run(from_spec(spec), [digits], options(tmp_path), lambda *report: reports.append(report))
    (said,) = [stage for stage, _, total, _ in reports if not total and stage.startswith("about")]
    forward, backward = re.fullmatch(r"about ([\d,]+) forward (?:and ([\d,]+) backward )?batches, .*", said).groups()  # pyright: ignore
    assert result.cost is not None
    spent = (result.cost.forward_batches, result.cost.backward_batches)
    rounding, most = 1.05, 6 if "quadratic" in spec else 2.2  # two digits; a quadratic settles after a few moves
    for planned, count in zip((forward, backward or "0"), spent, strict=True):
        assert count <= rounding * int(planned.replace(",", "")) <= most * count + 30, (said, spent)
    left = [figures["left"] for *_, figures in reports if "left" in figures]
    assert left and left[-1] < max(left)


def test_a_comparison_scores_every_candidate_alone_once(at_once: None, digits: Path, tmp_path: Path):
    reports: list[Report] = []
    compare([digits], options(tmp_path), lambda *report: reports.append(report), strategies=["soup", "aswa", "best"])
    (said,) = [stage for stage, _, total, _ in reports if not total and stage.startswith("about")]
    (count,) = re.findall(r"about ([\d,]+) forward batches", said)
    # a score: 8 batches with loss and metric, and 15 for BatchNorm; 4 alone, 3 of soup, 3 of aswa, 4 results, 1 file
    assert int(count.replace(",", "")) == pytest.approx(15 * 31, rel=0.06)


def test_the_library_gets_no_announcement_of_a_brief_run(digits: Path, tmp_path: Path):
    reports: list[Report] = []
    run(from_spec("best"), [digits], options(tmp_path), lambda *report: reports.append(report))
    assert not [stage for stage, _, total, _ in reports if not total and stage.startswith(("about", "how long"))]


def test_a_strategy_without_stages_has_an_unknown_length(
    at_once: None, monkeypatch: pytest.MonkeyPatch, digits: Path, tmp_path: Path
):
    strategy, reports = from_spec("best"), list[Report]()
    monkeypatch.setattr(type(strategy), "stages", lambda *_: None)
    run(strategy, [digits], options(tmp_path), lambda *report: reports.append(report))
    assert [stage for stage, _, total, _ in reports if not total].count("how long this takes is unknown") == 1
    assert any("stage_left" in figures for *_, figures in reports)


def test_seconds_left_are_those_of_the_work_left():
    """Ten steps of 3 units in 1.5 s each, then four scores of 10 units; half a second a unit, loading not counted."""
    plan = [Stage("learning", forward=10, backward=10), Stage("scoring", forward=40)]
    rest = Estimate(lambda: plan, "forward", 0.0)
    now = 0.0
    rest.report("loading", 0.5, now := now + 100)  # not planned
    for step in range(1, 11):
        rest.work(1)
        rest.work(2)
        rest.report("learning", step / 10, now := now + 1.5)
        expected = 0.5 * (70 - 3 * step)
        assert rest.left(now) == (None if step == 1 else pytest.approx(expected))
    rest.report("scoring", 0.25, now := now + 0.001)  # read from a journal: no work, no time
    assert rest.left(now) == pytest.approx(0.5 * 30)
    for _ in range(5):
        rest.work(1)
        now += 0.5
    assert rest.left(now) == pytest.approx(0.5 * 26, rel=0.1)  # the fifth batch may be running
    assert rest.summary(1200) == "about 50 forward and 10 backward batches, about 20 min"
    assert [about(seconds) for seconds in (3, 42, 100, 5000, 9000)] == [
        "about 5 s", "about 40 s", "about 2 min", "about 83 min", "about 2.5 h",
    ]  # fmt: skip


def test_a_stage_that_ends_early_is_finished():
    plan = [Stage("training", forward=100), Stage("scoring", forward=10)]
    rest = Estimate(lambda: plan, "forward", 0.0)
    for step in range(1, 5):
        rest.work(1)
        rest.report("training", step / 100, float(step))
    rest.work(5)
    rest.report("scoring", 0.5, 9.0)
    assert rest.left(9.0) == pytest.approx(5.0)


def test_a_stage_is_shown_although_batches_are_counted_just_before_its_report(monkeypatch: pytest.MonkeyPatch):
    clock, reports = [0.0], list[Report]()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    shown = progress.Progress(lambda *report: reports.append(report))
    shown.expect(lambda: [Stage("scoring", forward=40)])
    shown("reading", 8, 8)
    for step in range(40):
        clock[0] += 0.2
        shown.work(1)  # reports, so that the next report is within a tenth of a second
        clock[0] += 0.05
        shown("scoring", step // 10 + 1, 4)
    assert [done for stage, done, *_ in reports if stage == "scoring"].count(2) >= 9
