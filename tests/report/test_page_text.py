"""The page as text: the answer in words, its size, its bytes, and reports with odd or hostile values."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from ckptavg.report.page import page
from ckptavg.report.page.numbers import interval, steps, with_noise
from ckptavg.report.page.verdict import answer

Report = dict[str, Any]
HOSTILE = "<script>alert(1)</script>"
MARKED = "a\u202egnp.\u2066txt\udcff\x1b[31m"
NONE = dict.fromkeys(("loss", "metric", "examples", "loss_noise", "metric_noise"))


def gain(value: float, low: float | None = None, high: float | None = None) -> Report:
    separated = low is not None and high is not None and (low > 0 or high < 0)
    reason = "" if low is not None else "3 of 400 examples differ"
    return {"value": value, "low": low, "high": high, "separated": separated, "reason": reason}


@pytest.mark.parametrize(
    ("last", "best", "level", "words"),
    [
        (gain(0.1, 0.05, 0.15), gain(0.04, 0.01, 0.07), "yes", "sewa: metric +0.100 [+0.050, +0.150] against"),
        (gain(0.1, 0.05, 0.15), gain(0.01, -0.01, 0.03), "partly", "and +0.010 [−0.010, +0.030] against the best"),
        (gain(0.01, -0.02, 0.04), gain(0.01, -0.01, 0.03), "no", "metric +0.010 [−0.020, +0.040] against the last"),
        (gain(0.1, 0.05, 0.15), gain(-0.04, -0.07, -0.01), "worse", "and WORSE, −0.040 [−0.070, −0.010] against"),
        (gain(0.1), gain(0.1), "none", "metric +0.1000 against the last checkpoint and +0.1000 against"),
    ],
)  # fmt: skip
def test_the_answer_has_the_differences_and_what_they_are_worth(
    reports: Mapping[str, Report], last: Report, best: Report, level: str, words: str
):
    found = answer({**reports["sewa"], "gains": {"last": last, "best": best}})
    assert words in found.sentence and found.level == level
    assert found.belief.startswith("On test data, which decided nothing, it ")


def test_the_top_of_a_comparison_has_winner_steps_gain_interval_and_evidence(reports: Mapping[str, Report]):
    report = reports["comparison"]
    head = re.sub(r"<[^>]+>", "", page([report]).partition("<main")[0].partition("<header>")[2])
    steps_used = [c["step"] for c in report["candidates"] if c["coefficient"]]
    row = next(row for row in report["strategies"] if row["name"] == report["winner"])
    assert f"{report['winner']} wins: metric {interval(row['over_last']['test'])} against the last" in head
    assert steps(steps_used) in head and "On test data, which decided nothing" in head
    assert (
        report["gains"]["last"]["value"] == row["over_last"]["test"]["value"]
        and interval(report["gains"]["best"]) in head
    )


def test_without_test_data_nothing_is_called_evidence(reports: Mapping[str, Report]):
    for name in ("without test data", "comparison without test data"):
        found = answer(reports[name])
        assert (
            found.level == ("worse" if reports[name]["worse"] else "none")
            and "validation data that the choice was made on" in found.belief
        )
        assert all(fact.meaning == "no evidence: chosen on these data" for fact in found.facts) and found.facts
    found = answer(reports["nothing scored"])
    assert found.level == "none" and "nothing was scored" in found.sentence


def test_a_metric_that_falls_has_the_sign_of_better(reports: Mapping[str, Report]):
    report = copy.deepcopy(reports["without test data"])
    for scores in (report["scores"], *report["baselines"].values()):
        scores["val"]["metric"] = 1 - scores["val"]["metric"]
    assert answer(report).facts == answer(reports["without test data"]).facts


def test_the_same_report_gives_the_same_bytes_and_ids_are_unique(reports: Mapping[str, Report]):
    shown = [reports["sewa"], reports["comparison"], reports["sewa"]]
    text = page(shown)
    assert text == page(copy.deepcopy(shown))
    ids = Counter(re.findall(r' id="([^"]+)"', text))
    assert ids.most_common(1)[0][1] == 1
    used = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
    used |= {
        name for names in re.findall(r'aria-\w+="([^"]+)"', text) for name in names.split() if re.match(r"r\d-", name)
    }
    assert used - ids.keys() == {"main"} - ids.keys()
    assert not re.search(r'(src|href)="(?!#|data:image/png)', text) and "@import" not in text


def enlarged(report: Report, n: int) -> Report:
    """Return the report of a run with ``n`` candidates: those of a real one, over and over."""
    report = copy.deepcopy(report)
    old = report["candidates"]
    report["candidates"] = [
        {**old[i % len(old)], "step": 500 * (i + 1), "path": f"runs/2026/long-name-of-a-job/checkpoint-{500 * (i + 1)}"}
        for i in range(n)
    ]
    if report["trace"].get("s"):
        report["trace"]["s"] = [[row[i % len(row)] for i in range(n)] for row in report["trace"]["s"]]
    for row in report.get("strategies", ()):
        row["coefficients"] = [row["coefficients"][i % len(old)] for i in range(n)]
    report["output"]["source_digests"] = {c["path"]: "blake3:" + 64 * "a" for c in report["candidates"]}
    return report


@pytest.mark.parametrize("name", ["sewa", "aswa", "comparison", "layer-wise twa"])
def test_a_page_of_300_candidates_is_below_one_megabyte(reports: Mapping[str, Report], name: str):
    report = enlarged(reports[name], 300)
    if name == "layer-wise twa":
        report["groups"] = [[f"transformer.h.{i}.attention.weight"] for i in range(40)]
        for i, candidate in enumerate(report["candidates"]):
            candidate["coefficient"] = [((i * 7 + g * 3) % 23 - 11) / 100 for g in range(40)]
    text = page([report])
    assert len(text.encode()) < 1_000_000
    assert "checkpoint-150000" in text and "150,000" in text


@pytest.mark.parametrize("name", [HOSTILE, MARKED, "$\\frac{1}{$", "שלום/検査", "{{ 7 * 7 }}", "]]></svg><b>"])
@pytest.mark.parametrize("kind", ["comparison", "layer-wise twa", "swag", "landscape", "inspection"])
def test_names_are_text(reports: Mapping[str, Report], kind: str, name: str):
    report = copy.deepcopy(reports[kind])
    for number, candidate in enumerate(report["candidates"] if kind != "landscape" else []):
        candidate["path"] = f"{name}/{number}"
    for row in report.get("strategies", ()):
        if row["name"] == report["winner"]:
            row["name"] = report["winner"] = f"{name}:k=1"
    for scores in [report.get("scores", {}), *(row["scores"] for row in report.get("strategies", ()))]:
        for score in scores.values():
            score["metrics"] = {name: score["metric"]}
    if kind == "layer-wise twa":
        report["groups"] = [[name], [name, name]]
    if kind == "landscape":
        report["plane"]["mixtures"][0]["name"], report["plane"]["source"] = name, f"/{name}"
    report |= {"warnings": [name] * 100, "left_out": [{"path": name, "reason": name, "kind": "bad", "hint": None}]}
    report["run"]["command"] = f"ckptavg {name}\n# a second line"
    text = page([report])
    text.encode()  # no lone surrogates
    assert (
        text.count("<script>") == 1
        and text.count("</svg>") == text.count("<svg ")
        and "49" not in re.findall(r"<bdi>(\d+)/0</bdi>", text)
    )
    assert not any(mark in text for mark in "\u202e\u2066\x1b")


def test_unknown_values_leave_gaps_and_no_errors(reports: Mapping[str, Report]):
    def emptied(value: Any, key: str = "") -> Any:
        if isinstance(value, dict) and "confidence" not in value:
            return {name: emptied(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [emptied(inner, key) for inner in value]
        return None if key in ("loss", "metric", "loss_noise", "metric_noise", "low", "high", "held-out") else value

    for name in ("sewa", "aswa", "twa", "swag", "comparison", "quadratic twa", "quadratic sewa"):
        report = emptied(reports[name])
        for candidate in report["candidates"]:
            candidate["score"] = {**NONE, "invalid": "loss is nan"}
        text = page([report])
        assert "loss is nan" in text and ">None<" not in text and "nan ±" not in text


def test_an_invalid_candidate_is_counted_and_its_reason_shown(reports: Mapping[str, Report]):
    report = copy.deepcopy(reports["sewa"])
    report["candidates"][3]["score"] = {**NONE, "invalid": "loss is inf in batch 2"}
    text = page([report])
    assert "1 without a valid score are not shown" in text and "loss is inf in batch 2" in text


def test_a_better_metric_with_a_higher_loss_says_so(reports: Mapping[str, Report]):
    report = copy.deepcopy(reports["sewa"])
    report["scores"]["test"]["loss"] = 2.5
    report["baselines"]["last"]["test"]["loss"], report["baselines"]["best"]["test"]["loss"] = 1.5, 3.5
    assert answer(report).belief.endswith("But its loss, 2.5000, is higher than that of the last checkpoint (1.5000).")
    report["scores"]["test"]["loss"] = 0.5
    assert "But its loss" not in answer(report).belief


def test_a_replaced_selection_says_so(reports: Mapping[str, Report]):
    report = {**reports["sewa"], "replaced": True, "worse": True}
    report["baselines"] = {**report["baselines"], "selection": report["scores"]}
    found = answer(report)
    assert found.level == "worse" and "was written instead" in found.sentence
    assert "written: best single" in page([report])


@pytest.mark.parametrize(
    ("value", "noise", "text"),
    [(0.97, 0.0085, "0.970 ± 0.009"), (0.948, 0.011, "0.948 ± 0.011"), (12345.6, 120.0, "12346 ± 120"),
     (-0.5, None, "−0.5000"), (None, 0.1, ""), (0.5, 0.0, "0.5000")],
)  # fmt: skip
def test_values_have_the_digits_of_their_noise(value: float | None, noise: float | None, text: str):
    assert with_noise(value, noise) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([5], "5"), ([1000, 3000], "1,000, 3,000"), ([10, 20, 30, 40], "10 to 40, every 10"), ([1, 2, 3, 4], "1 to 4"),
     ([1, 2, 4, 8, 16, 32, 64], "1, 2, 4, 8, 16, … 64")],
)  # fmt: skip
def test_steps_are_listed_shortly(numbers: list[int], text: str):
    assert steps(numbers) == text
