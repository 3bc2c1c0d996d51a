"""Bars of coefficients and the line of scores over steps, on terminals of any width."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType

from ckptavg.cli.terminal import show_message
from ckptavg.report.bars import Sparkline, bars, binned, heights
from ckptavg.report.candidates import candidates_table
from ckptavg.report.layout import FittedTable, Sentence, shortened
from ckptavg.report.result import CandidateResult, Output, Result
from ckptavg.score import Score

PARTS = {"█": 1.0, "▉": 0.875, "▊": 0.75, "▋": 0.625, "▌": 0.5, "▐": 0.5, "▍": 0.375, "▎": 0.25, "▏": 0.125,
         "▕": 0.125}  # fmt: skip


def printed(renderable: RenderableType, width: int, *, terminal: bool = False, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="")
    Console(width=width, file=file, force_terminal=terminal, no_color=True, highlight=False).print(renderable)
    file.seek(0)
    return re.sub(r"\x1b\[[\d;]*m", "", file.read())


def lengths(texts: list[str]) -> list[float]:
    return [sum(PARTS.get(char, 0.0) for char in text) for text in texts]


@pytest.mark.parametrize("width", [8, 13, 24])
def test_a_bar_is_as_long_as_its_number_within_a_sixteenth_of_a_column(width: int):
    values = [i / 40 for i in range(41)]
    drawn = lengths([bar.plain for bar in bars(values, width)])
    assert drawn[0] == 0 and drawn[-1] == width
    assert all(abs(length - width * value) <= 1 / 16 + (0 < value < 0.01) for length, value in zip(drawn, values))  # noqa: B905
    assert all(bar.plain for bar in bars([1e-9, 1.0], width))  # not 0, so not nothing


@pytest.mark.parametrize("width", [8, 13, 24])
@pytest.mark.parametrize("values", [[-0.5, 0.0, 1.5], [-2.0, 3.0, -1e-6], [-0.001, 1.0, 0.001], [-9.0, 10.0, 0.0]])
def test_negative_numbers_are_left_of_the_line_and_positive_ones_right_without_colour(
    values: list[float], width: int
):  # fmt: skip
    texts = [bar.plain for bar in bars(values, width)]
    (axis,) = {text.index("│") for text in texts}
    assert all(len(text) <= width for text in texts)
    for value, text in zip(values, texts, strict=True):
        left, right = text[:axis].strip(), text[axis + 1 :].strip()
        assert (bool(left), bool(right)) == (value < 0, value > 0)
    (low, high) = min(values), max(values)
    longest = lengths([texts[values.index(low)], texts[values.index(high)]])
    scale = max(longest) / max(-low, high) if -low / high < 1 else longest[0] / -low
    assert abs(longest[0] - scale * -low) <= 0.75 and abs(longest[1] - scale * high) <= 0.75


def test_heights_rise_with_the_value_and_unknown_ones_are_gaps():
    assert heights([0, 1, 2, 3, 4, 5, 6, 7], 0, 7) == "▁▂▃▄▅▆▇█"
    assert heights([1.0, None, math.nan, math.inf, 2.0], 1, 2) == "▁   █"
    assert heights([3.0, 3.0], 3, 3) == "▁▁"


def test_neighbours_share_a_column_where_there_are_many():
    assert binned([1.0, 3.0, None, None, 5.0, None], 3) == [2.0, None, 5.0]
    assert binned([*map(float, range(300))], 300) == [*range(300)]
    assert len(binned([1.0] * 300, 37)) == 37


@pytest.mark.parametrize("width", [72, 80, 120])
def test_a_line_of_three_hundred_scores_is_one_line_with_its_range_and_the_best(width: int):
    values: list[float | None] = [math.sin(i / 30) for i in range(300)]
    values[100:150] = [None] * 50
    line = Sparkline(name="metric", steps=range(0, 30000, 100), values=values, best=47, places=3)
    (text,) = printed(line, width).splitlines()
    assert len(text) <= width
    assert text.startswith("metric, step 0 ") and text.endswith(" 29900: -0.959 to 1.000, best at step 4700")
    drawn = text.removeprefix("metric, step 0 ").partition(" 29900:")[0]
    assert " " in drawn and set(drawn) <= {*"▁▂▃▄▅▆▇█ "}
    assert len(drawn) == width - (len(text) - len(drawn))


def test_there_is_no_line_without_room_or_scores_or_in_a_locale_without_blocks():
    line = Sparkline(name="loss", steps=range(9), values=[0.5] * 9, best=0)
    assert printed(line, 80) and not printed(line, 40) and not printed(line, 80, encoding="ascii")
    assert not printed(Sparkline(name="loss", steps=[1, 2], values=[1.0, 2.0], best=1), 80)


def result(coefficients: list[float], digits: int = 4) -> Result:
    n = len(coefficients)
    scores = [Score(value=0.5 + 0.01 * i, metric=0.5 + 0.01 * i, loss=1.0 - 0.01 * i, examples=400) for i in range(n)]
    scores[1] = Score(value=-math.inf, metric=math.nan, loss=math.inf, examples=400, invalid="NaN")
    candidates = [
        CandidateResult(path=Path(f"run/step-{10**digits + i}.pt"), step=10**digits + i, coefficient=c, score=scores[i])
        for i, c in enumerate(coefficients)
    ]
    output = Output(path=Path("a.safetensors"), bytes=1, dtype="float32")
    return Result(strategy="twa", settings={}, seed=0, candidates=candidates, output=output)


@pytest.mark.parametrize("width", range(30, 120, 7))
def test_bars_are_the_first_to_go(width: int):
    table = printed(Group(*candidates_table(result([-0.5, 1.0, 0.25, 0.25]))), width)
    plain = printed(Group(*candidates_table(result([0.25, 0.25, 0.25, 0.25]))), width)
    assert all(len(line) <= width for line in table.splitlines())
    assert ("│" in table) == (width >= 55)  # the table without bars needs 45 columns
    assert "│" not in plain and "█" not in plain.partition("candidates")[2]  # equal coefficients are no picture
    if width >= 80:
        for word in ("● -0.500", "●  1.000", "●  0.250"):  # aligned at the decimal point
            assert word in table
        assert "metric, step 10000 ▁ " in table  # the invalid score is a gap


def test_bars_need_blocks_and_leave_the_numbers():
    table = FittedTable(title="", headings=["name", "x"], rows=[["a", "-1"], ["b", "2"]], bars=[-1.0, 2.0])
    assert "█" in printed(table, 80) and "█" not in printed(table, 80, encoding="ascii").replace("\\u2588", "█")
    assert re.search(r"a +-1", printed(table, 80, encoding="ascii"))


def test_the_row_below_a_table_takes_no_part_in_the_names_common_parts():
    rows = [[f"run/checkpoint-{i}", "0.123"] for i in (1000, 2000)]
    text = printed(FittedTable(title="", headings=["n", "loss"], rows=rows, foot=["± std. error", "±0.011"]), 24)
    assert "run/checkpoint-*" in text and re.search(r"± std. error +±0.011", text)
    empty = printed(FittedTable(title="", headings=["n", "loss"], rows=rows, foot=["± std. error", ""]), 60)
    assert "±" not in empty


def test_the_written_path_is_shortened_on_a_terminal_only():
    path = "/home/user/experiments/2026/a-very-long-name-of-a-directory/averaged.safetensors"
    line = Sentence(f"wrote {path}: 2,448 bytes, float32", path=path)
    (shown,) = printed(line, 80, terminal=True).splitlines()
    assert shown.startswith("wrote /home/user/exp") and "…" in shown
    assert shown.endswith("averaged.safetensors: 2,448 bytes, float32") and len(shown) <= 80
    (narrow,) = printed(line, 64, terminal=True).splitlines()
    assert "…/averaged.safetensors: 2,448" in narrow and len(narrow) <= 64
    assert path in printed(line, 200) and path in printed(line, 200, terminal=True)
    assert path in printed(line, 90)


def test_a_message_is_broken_between_words_and_its_paths_are_whole():
    path = "/data/" + "x" * 90 + "/epoch-19.pt"
    text = f"left out {path}: it changed 1 s ago, so a job may still be saving it, --wait-stable 60 waits for it"
    file = io.StringIO()
    show_message(Console(width=80, file=file, force_terminal=True, no_color=True, highlight=False), text, "")
    lines = file.getvalue().splitlines()
    assert " ".join(lines) == text and any(path in line for line in lines)
    assert all(len(line) <= 80 for line in lines if path not in line)
    log = io.StringIO()
    show_message(Console(width=80, file=log, highlight=False), text, "")
    assert log.getvalue() == text + "\n"


def test_names_of_wide_characters_are_cut_to_columns():
    names = ["実験" * 20 + str(i) for i in range(3)]
    short = shortened(names, 20)
    assert len(set(short)) == 3 and all(cell_len(name) <= 20 for name in short)
