"""A slice of the study too small to be meaningful, measured in the same way as the whole."""

from __future__ import annotations

import gzip
import itertools
import random
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from scipy.stats import ttest_1samp
from study import report, run
from study.cell import Cell, measure
from study.domains import domain
from study.interval import Interval
from study.job import Training
from study.plan import PLANS, Plan, digest
from study.record import Failure, Record, Row, append, read
from study.setting import Setting, settings
from study.subsets import Subsets, drawn, shape
from study.tables import overview, setting_table
from study.training import rate, train

from ckptavg.coefficients import Coefficients
from ckptavg.errors import CkptavgError

TINY = Plan(
    name="tiny",
    seeds=1,
    checkpoints=5,
    last=4,
    k=2,
    ks=(1, 2, 4),
    every=0.2,
    sewa_steps=3,
    twa_epochs=1,
    random=3,
    singles=2,
)


@pytest.fixture(scope="module")
def record() -> Record:
    return measure(Cell(domain="logistic", seed=0, schedule="constant"), TINY)


@pytest.fixture
def results(tmp_path: Path, record: Record) -> Path:
    """Return two seeds of two schedules; the second seed of each is a copy with better figures throughout."""
    path = tmp_path / "results.jsonl"
    for seed, schedule in itertools.product((0, 1), ("constant", "cosine")):
        rows = [replace(row, figure=row.figure + 0.01 * seed) for row in record.rows]
        append(path, replace(record, seed=seed, schedule=schedule, rows=rows))
    return path


@pytest.fixture
def real(tmp_path: Path, record: Record) -> Path:
    """Return three seeds of two schedules of a domain of real data, as if `record` had been one; cosine is worse."""
    path = tmp_path / "real.jsonl"
    swa = record.row("SWA")
    assert swa is not None
    theirs = replace(swa, label="theirs", used=None, chosen=None, epochs=None, seconds=None, figure=swa.figure - 0.1)
    for seed, schedule in itertools.product(range(3), ("constant", "cosine")):
        lower = 0.05 * (schedule == "cosine")
        rows = [replace(row, figure=row.figure - lower) for row in (*record.rows, theirs)]
        append(path, replace(record, domain="fashion", seed=seed, schedule=schedule, rows=rows))
    return path


def test_a_record_has_every_strategy_of_ckptavg(record: Record):
    assert {row.label for row in record.rows} == {
        *(label for label, spec in TINY.strategies.items() if spec not in record.skipped),
        "random",
        "best subset",
        "compare's pick",
    }
    assert not {"last", "swa", "soup", "aswa", TINY.sewa(2), TINY.twa("on=train")} & set(record.skipped)


def test_ranks_are_those_of_a_literal_evaluation(record: Record, tmp_path: Path):
    # logistic regression has no buffers: averaging two state dicts is the complete reference
    job = domain("logistic").job(0, None)
    every = 10
    training = Training(
        folder=tmp_path / "c", steps=50, every=every, schedule="constant", seed=0, device=torch.device("cpu")
    )
    train(job, training)
    states = [torch.load(tmp_path / "c" / f"step-{every * i}.pt")["state_dict"] for i in (2, 3, 4, 5)]
    model, losses = job.model(), {}
    for pair in itertools.combinations(range(4), 2):
        model.load_state_dict({name: (states[pair[0]][name] + states[pair[1]][name]) / 2 for name in states[0]})
        with torch.no_grad():
            losses[pair] = float(torch.cat([job.loss(model, batch) for batch in job.val]).double().mean())
    order = sorted(losses, key=losses.__getitem__)
    ranked = [row for row in record.rows if row.rank is not None]
    assert {"LAWA", "SeWA", "best subset"} <= {row.label for row in ranked}
    for row in ranked:
        assert row.chosen is not None
        assert row.rank == 1 + order.index(tuple(row.chosen))
        assert row.val_loss == pytest.approx(
            losses[tuple(row.chosen)], rel=1e-6
        )  # float32 passes, summed in another order


def test_a_rank_is_of_what_was_chosen_and_shared_by_equals():
    subsets = Subsets(losses={(0, 1): 0.5, (0, 2): 0.1, (1, 2): 0.5}, seconds=0, epochs=0)
    assert [subsets.rank(chosen) for chosen in ((0, 2), [0, 1], (1, 2))] == [1, 2, 2]
    assert subsets.rank(None) is None and subsets.rank((1,)) is None


def test_only_uniform_averages_of_k_have_a_rank(record: Record):
    assert {row.label for row in record.rows if row.rank is None} >= {"last", "SWA", "EMA 0.9", "random"}
    for row in record.rows:
        assert (row.rank is not None) == (row.chosen is not None and len(row.chosen) == 2), row.label


def test_a_row_keeps_what_its_coefficients_say():
    assert shape(Coefficients(((0.5, 0, 0.5),))) == {"used": 2, "chosen": (0, 2), "negative": 0}
    assert shape(Coefficients(((1.5, -0.25, -0.25),))) == {"used": 3, "chosen": None, "negative": 0.5}


def test_the_random_row_is_the_mean_over_subsets(record: Record):
    row = record.row("random")
    assert row is not None
    losses, figures = zip(*record.points[TINY.singles :], strict=True)
    assert len(losses) == TINY.random
    assert (row.val_loss, row.figure) == (pytest.approx(fmean(losses)), pytest.approx(fmean(figures)))


def test_at_all_candidates_sewa_and_lawa_are_swa(record: Record):
    swa = record.row("SWA")
    assert swa is not None
    assert [row.figure for row in record.sweep if row.used == TINY.last] == [swa.figure, swa.figure]


def test_random_subsets_are_distinct_and_the_same_again():
    found = drawn(6, 3, 100, seed=1)
    assert len(set(found)) == len(found) == 20  # there are no more
    assert drawn(300, 5, 4, seed=1) == drawn(300, 5, 4, seed=1) != drawn(300, 5, 4, seed=2)


@pytest.mark.parametrize(("done", "wanted"), [(0.025, 0.5), (0.5, 1), (0.9, 0.5), (1.0, 0)])
def test_a_warm_up_stable_decay_schedule_has_three_parts(done: float, wanted: float):
    assert rate("wsd", done) == pytest.approx(wanted, abs=0.03)
    assert rate("constant", done) == 1


def test_the_early_part_uses_no_later_checkpoint(record: Record):
    # 60 % of 5 checkpoints are 3
    (swa,) = (row for row in record.early if row.label == "SWA")
    assert swa.used == TINY.early == 3


def test_records_survive_their_file(results: Path, record: Record):
    found = [one for one in read(results) if isinstance(one, Record)]
    assert len(found) == 4
    assert found[0].row("SWA") == replace(record.row("SWA"), chosen=[0, 1, 2, 3])


def test_the_last_line_of_a_cell_counts_and_comes_last(results: Path, record: Record):
    append(results, replace(record, cpu_seconds=1.25))
    found = read(results)
    assert len(found) == 4 and isinstance(found[-1], Record)
    assert (found[-1].cell, found[-1].cpu_seconds) == (record.cell, 1.25)


def test_half_a_line_is_passed_over_and_the_next_is_whole(results: Path, record: Record):
    with results.open("a") as file:
        file.write('{"digest": "ab')
    append(results, replace(record, seed=7))
    assert [one.seed for one in read(results)] == [0, 0, 1, 1, 7]


def test_finished_cells_are_not_measured_again(results: Path, monkeypatch: pytest.MonkeyPatch):
    cells = [Cell(domain="logistic", seed=seed, schedule="constant") for seed in (0, 1)]
    monkeypatch.setattr(run, "ProcessPoolExecutor", _Refusing)
    before = results.read_bytes()
    assert run.run(cells, TINY, results, workers=1) == 0
    assert results.read_bytes() == before


def test_other_settings_are_measured_anew(record: Record):
    assert digest("logistic", TINY) == digest("logistic", replace(TINY, seeds=9)) == record.digest
    others = digest("logistic", replace(TINY, k=1)), digest("logistic", TINY, Path("data")), digest("cartpole", TINY)
    assert record.digest not in others


class _Refusing:
    """A pool that accepts no work."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _Refusing:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, *_: object) -> None:
        raise AssertionError("a finished cell was submitted")


def test_a_failed_training_is_named_and_tried_again(results: Path, tmp_path: Path, record: Record):
    failure = Failure(digest=record.digest, domain="logistic", seed=2, schedule="cosine", error="loss is nan")
    append(results, failure)
    report.write(results, tmp_path)
    text = (tmp_path / report.NAME).read_text()
    assert "| logistic | 2 | cosine | loss is nan |" in text
    append(results, replace(record, seed=2, schedule="cosine"))  # the next run succeeds
    report.write(results, tmp_path)
    assert "failed" not in (tmp_path / report.NAME).read_text()


def test_a_task_that_raises_is_a_failure_and_no_crash(monkeypatch: pytest.MonkeyPatch):
    def diverged(*_: object) -> Record:
        raise CkptavgError("candidate 3 has loss nan")

    monkeypatch.setattr(run, "measure", diverged)
    result = run.measured(Cell(domain="logistic", seed=0, schedule="cosine"), TINY)
    assert isinstance(result, Failure)
    assert "loss nan" in result.error


def test_data_that_cannot_be_read_are_a_failure_and_no_crash(tmp_path: Path):
    result = run.measured(Cell(domain="cifar", seed=0, schedule="cosine", data=tmp_path), TINY)
    assert isinstance(result, Failure) and "binary version" in result.error


def test_wrong_arguments_end_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run.main(["--domains", "digits,logistic", "--out", str(tmp_path / "a")]) == 2
    assert run.main(["--domains", "cifar", "--out", str(tmp_path / "a")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no domain 'digits'" in lines[0] and "--data" in lines[1]
    assert not (tmp_path / "a").exists()


def test_the_report_has_every_strategy_and_claim_and_no_date(results: Path, tmp_path: Path, record: Record):
    report.write(results, tmp_path)
    text = (tmp_path / report.NAME).read_text()
    for label in (row.label for row in record.rows):
        assert text.count(f"| {label} |") >= 3, label  # one per schedule, and the overview
    for heading in ("SeWA for every K", "ASWA is at least SWA", "first 60 %", "disagree", "or a decay?"):
        assert heading in text, heading
    assert "torch" in text and "processors" in text and "./scripts/study/run.sh" in text
    assert "nan" not in text
    again = text
    report.write(results, tmp_path)
    assert (tmp_path / report.NAME).read_text() == again


def test_the_answer_comes_first_and_has_the_figures_of_the_tables(real: Path, tmp_path: Path):
    report.write(real, tmp_path, "pictures")
    text = (tmp_path / report.NAME).read_text()
    answer = text.split("\n\n")[1]
    (line,) = re.findall(r"best mean places.*?\*\*(.+?)\*\* ([\d.]+)", answer)
    first = next(
        row for row in text.splitlines() if row.startswith("| ") and "mean place" not in row and "---" not in row
    )
    assert [cell.strip() for cell in first.split("|")[1:3]] == list(line)
    assert "(pictures/overview.svg)" in text and (tmp_path / "pictures" / "overview.svg").stat().st_size > 5000
    assert text.index("overview.svg") < text.index("## How it was measured") < text.index("## Images")


def test_an_average_of_another_tool_is_compared_but_has_no_place(real: Path, tmp_path: Path):
    report.write(real, tmp_path)
    text = (tmp_path / report.NAME).read_text()
    assert re.search(r"\| fashion, constant: theirs \| \S+ \| \*\*\+10\.00 ± 0\.00\*\* \|", text)
    overview = text[: text.index("## How it was measured")]
    assert "| theirs |" not in overview and "| SWA |" in overview
    assert "That pick against theirs: images 2 / 0 of 2." in overview


def test_candidates_without_an_order_have_no_last_one():
    assert setting_of("spam-16").sign("SWA", "last") is None and setting_of("fashion").sign("SWA", "last") is not None
    assert "last" not in setting_of("spam-16").places() and "SWA" in setting_of("spam-16").places()


def test_a_strategy_that_few_domains_run_has_no_place_and_changes_no_other_digest():
    shards, images = (PLANS["full"].of(name) for name in ("spam-16", "fashion"))
    assert shards.strategies["OWA"] == "twa:constraint=linear" and "OWA" not in images.strategies
    assert digest("spam-16", shards) != digest("spam-16", replace(shards, more={}))
    assert digest("fashion", images) == digest("fashion", replace(images, more={}))
    one = setting_of("spam-16")
    rows = [*one.records[0].rows, replace(one.records[0].rows[0], label="OWA", figure=0.9, also={"nonzeros": 3.0})]
    one = replace(one, records=[replace(record, rows=rows) for record in one.records])
    assert one.places() == {"SWA": 1.0} and "| OWA |" not in overview([one]) and "| OWA |" in setting_table(one)


def setting_of(name: str) -> Setting:
    """Return three equal seeds of a domain, of two strategies."""
    row = Row(label="SWA", spec="swa", used=2, val_loss=1, test_loss=1, figure=0.5, epochs=1, seconds=1)
    rows = [row, replace(row, label="last", figure=0.4)]
    records = [
        Record(
            digest="", plan="full", machine="", domain=name, seed=i, schedule="x", n=2, k=1, subsets=2, epochs=1,
            seconds=1, rows=rows, sweep=[], early=[], points=[], skipped=[], cpu_seconds=1,
        )
        for i in range(3)
    ]  # fmt: skip
    return Setting(name=name, schedule="x", records=records)


def test_a_constant_rate_is_compared_with_a_decay_by_seed(real: Path, tmp_path: Path):
    report.write(real, tmp_path)
    text = (tmp_path / report.NAME).read_text()
    assert "| fashion: cosine | **+5.00 ± 0.00** |" in text  # the last of each, 0.05 apart in every seed


def test_a_compressed_file_reads_alike(results: Path):
    packed = results.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(results.read_bytes()))
    assert read(packed) == read(results)


def test_the_published_page_is_made_from_the_published_results(tmp_path: Path):
    docs = Path(__file__).parent.parent.parent / "docs"
    report.write(docs / "study" / "results.jsonl.gz", tmp_path, "study")
    assert (tmp_path / report.NAME).read_text() == (docs / report.NAME).read_text()
    assert {path.name for path in (tmp_path / "study").iterdir()} == {path.name for path in docs.glob("study/*.svg")}


def test_differences_are_paired_by_seed(results: Path):
    records = [one for one in read(results) if isinstance(one, Record)]
    for one in settings(records):
        # the second seed is better by the same amount for all strategies, so that no difference varies
        for label in one.labels:
            found = one.difference(label, "SWA")
            assert found is not None and found.half == pytest.approx(0, abs=1e-9)


def test_the_interval_is_students():
    draws = random.Random(0)
    values = [draws.gauss(1, 2) for _ in range(6)]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    found = Interval.of(values)
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(low), pytest.approx(high))
    assert Interval.of([3.0]) == Interval(mean=3.0, half=None, count=1)


@pytest.mark.parametrize(
    ("values", "sign"),
    [([1.0, 1.1, 0.9], 1), ([-1.0, -1.1, -0.9], -1), ([1.0, -1.0, 0.1], 0), ([0.25, 0.25], 0)],
)
def test_a_sign_needs_an_interval_without_zero(values: list[float], sign: int):
    assert Interval.of(values).sign == sign
    assert ("**" in f"{Interval.of(values):.2f}") == (sign != 0)


def test_measuring_again_gives_the_same(record: Record):
    other = measure(Cell(domain="logistic", seed=0, schedule="constant"), TINY)
    assert [replace(row, seconds=None) for row in other.rows] == [replace(row, seconds=None) for row in record.rows]
