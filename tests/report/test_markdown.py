"""Markdown report: the story that the terminal tells, and no markup from names, as a Markdown parser reads it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from ckptavg.cost import Cost
from ckptavg.report.as_json import to_dict
from ckptavg.report.markdown import markdown, short_summary, summary
from ckptavg.report.markup import block, code, escaped, table
from ckptavg.report.result import (
    CandidateResult,
    Comparison,
    Evaluation,
    FileScores,
    Gain,
    Output,
    Result,
    StrategyResult,
)
from ckptavg.runtime.command_line import CommandLine
from ckptavg.score import Score

HOSTILE = [
    "plain.pt", "a|b.pt", "`x`.pt", "``two``", "`", "<img src=x onerror=alert(1)>", "</details><script>x</script>",
    "*bold* _it_ ~~no~~", "[link](http://evil)", "![pic](x)", "line\nbreak\r\n# heading", "# heading", "- item",
    "&lt;", "\\", "\\|", "a\\`b", "$x$", "é漢字", "\x1b[31m", "trailing ", " ", "http://evil", "<!-- ckptavg -->", "||",
]  # fmt: skip
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")
SCORE = Score(value=0.5, loss=0.25, metric=0.5, examples=8)
LOW = Score(value=0.4, loss=0.35, metric=0.4, examples=8)
COST = Cost(forward_batches=4, backward_batches=2, evaluations=3, seconds=1.5, epochs=None, epochs_of="train")
RUN = CommandLine(command="ckptavg sewa ckpts --k 2", versions={"ckptavg": "1"}, processes=2)


def texts(markdown_text: str) -> list[str]:
    """Return the texts that a reader sees, of code spans too; fails on any raw HTML but that of details."""
    seen: list[str] = []
    for token in PARSER.parse(markdown_text):
        if token.type == "html_block":
            assert re.fullmatch(r"(<details><summary>[^<>]*</summary>|</details>)\n?", token.content), token.content
        for child in token.children or ():
            assert child.type != "html_inline" and child.type not in ("link_open", "image"), child
        if token.type == "inline":
            seen.append("".join(child.content for child in token.children or ()))
        elif token.type in ("fence", "code_block"):
            seen.append(token.content)
    return seen


def shown(text: str) -> str:
    """Return the text as it is to be seen: on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is(name: str):
    rows = [[code(name, cell=True), escaped(name)], [escaped(name), "next"]]
    text = "\n\n".join([table(["a", "b"], rows, left=2), f"- {escaped(name)}", code(name), block(name)])
    cells = texts(text)
    line = shown(name)
    assert cells[:2] == ["a", "b"]
    stripped = [cell.strip() for cell in cells]
    assert stripped[2:6] == [line.strip(), line.strip(), line.strip(), "next"]
    assert stripped[6 : 6 + bool(line.strip())] == ([line.strip()] if line.strip() else [])
    assert cells[-1].rstrip("\n") == "\n".join(shown(part) for part in name.splitlines())


def result(**changes: Any) -> Result:
    candidates = [
        CandidateResult(path=Path(f"ckpts/{i}"), step=i, coefficient=0.5 if i in (2, 3) else 0.0, score=LOW)
        for i in range(1, 31)
    ]
    fields: dict[str, Any] = {
        "strategy": "sewa", "settings": {"k": 2}, "seed": 7, "candidates": candidates,
        "scores": {"val": SCORE, "test": LOW}, "baselines": {"best": {"val": LOW, "test": LOW}, "swa": {"val": LOW}},
        "best_step": 9, "verdict": "Better than the rest.", "cost": COST, "warnings": ["something odd"],
        "output": Output(path=Path("out.safetensors"), bytes=1000, dtype="float32", data_digest="blake3:ab"),
        "next_steps": {"load": "load()", "verify": "ckptavg verify x"},
    }  # fmt: skip
    return Result(**(fields | changes))


def test_the_verdict_comes_first_and_everything_is_there():
    text = markdown([to_dict(result(), RUN)])
    seen = texts(text)
    assert seen[:2] == ["ckptavg sewa", "Better than the rest."]
    for part in (
        "sewa, as written", "0.5000", "best single (step 9)", "something odd", "load()\n", "ckptavg verify x\n",
        "ckptavg sewa ckpts --k 2\n", "2 processes (torchrun)", "sewa with k=2; seed 7",
        "digest of the output: blake3:ab", "out.safetensors: 1,000 bytes, float32",
    ):  # fmt: skip
        assert any(part in line for line in seen), part
    head, _, folded = text.partition("<details>")
    assert "| `2` | 2 | 0.500 |" in head and "| `9` | 9 |" in head and "| `30` | 30 |" in head and "| `8` |" not in head
    assert all(f"| `{i}` | {i} |" in folded for i in range(1, 31))


def test_a_run_without_scores_says_so():
    text = markdown([to_dict(result(scores={}, baselines={}, verdict="", cost=None))])
    assert "Nothing was scored" in text and "| scores |" not in text


def test_hostile_names_and_messages_stay_text():
    candidates = [CandidateResult(path=Path(f"c/{i}{name}"), step=i, coefficient=1.0, columns={name: name})
                  for i, name in enumerate(HOSTILE)]  # fmt: skip
    bad = result(
        candidates=candidates, warnings=HOSTILE, verdict=" ".join(HOSTILE), settings={"x": HOSTILE[5]},
        output=Output(path=Path(HOSTILE[6]), bytes=1, dtype="float32", not_averaged=HOSTILE),
        next_steps={"load": HOSTILE[5]}, tables={HOSTILE[6]: [{HOSTILE[5]: HOSTILE[1]}]},
    )  # fmt: skip
    report = to_dict(bad, replace(RUN, command="x\n```\n<script>", configuration={HOSTILE[5]: HOSTILE[6]}))
    for text in (markdown([report]), markdown([report, report]), summary(report), short_summary(report)):
        assert texts(text)


def test_a_comparison_has_its_strategies_by_the_figure_that_decided():
    rows = [
        StrategyResult(
            name=name, strategy=name, settings={}, coefficients=[1.0], groups=(("",),), used=1, effective=1.0,
            scores={"val": score, "test": score}, cost=COST,
            over_last={s: Gain(value=value, low=value - 0.1, high=value + 0.1) for s in ("val", "test")},
        )
        for name, score, value in (("last", LOW, 0.0), ("swa", SCORE, 0.05), ("soup:x=1", SCORE, 0.2))
    ]  # fmt: skip
    comparison = Comparison(**vars(result()), winner="soup:x=1", strategies=rows, selected_by="metric", reason="why")
    text = markdown([to_dict(comparison)])
    lines = [line for line in text.splitlines() if line.startswith(("| `", "| **`"))][:3]
    assert [re.findall(r"`([^`]+)`", line)[0] for line in lines] == ["soup:x=1", "swa", "last"]
    assert "+0.20 [+0.10, +0.30] |" in lines[0] and "+0.05 [-0.05, +0.15] ≈ |" in lines[1]
    assert texts(text)[1:3] == ["Better than the rest.", "why"]


def test_several_reports_stand_side_by_side():
    first, second = to_dict(result()), to_dict(result(strategy="swa", scores={"val": LOW}))
    text = markdown([first, second])
    rows = [line for line in text.splitlines() if re.match(r"\| \d \|", line)]
    assert rows == [
        "| 1 | `sewa` | `out.safetensors` | 0.5000 | 0.2500 | 0.4000 | 0.3500 | 1.5 |",
        "| 2 | `swa` | `out.safetensors` | 0.4000 | 0.3500 |  |  | 1.5 |",
    ]
    assert text.count("\n## ") == 2


def test_another_kind_is_listed_whole():
    report = to_dict(Evaluation(files=[FileScores(path=Path("x"), scores={"val": SCORE})]))
    text = markdown([report])
    (listing,) = [seen for seen in texts(text) if seen.startswith("{")]
    assert json.loads(listing) == report


def test_an_invalid_score_is_an_empty_cell():
    nan = Score(value=-math.inf, loss=math.nan, metric=None, examples=None, invalid="loss is nan")
    assert "| last |  |" in markdown([to_dict(result(baselines={"last": {"val": nan}}))])
