"""Tables and sentences on terminals of any width: no figure and no interval is cut or wrapped."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console, RenderableType

from ckptavg.report.layout import FittedTable, Sentence, shortened, without_common_parts

LIGHTNING = [f"epoch={i}-step={400 * i}-val_loss={1.9 / i:.2f}.ckpt" for i in range(1, 13)]
HUGGING_FACE = [f"out/run/checkpoint-{500 * i}" for i in range(1, 13)]
PATHS = [f"lightning_logs/version_3/a-very-long-directory-name/{name}" for name in LIGHTNING]
HEADINGS = ["step", "MulticlassF1Score", "val_metric_of_a_very_long_name", "vs last (test)", "used"]


def printed(renderable: RenderableType, width: int) -> str:
    """Return the lines that a terminal of this width shows."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("width", [45, 60, 80, 100, 200])
@pytest.mark.parametrize(
    "names", [LIGHTNING, HUGGING_FACE, PATHS, ["a.pt"] * 12], ids=["lightning", "hf", "paths", "equal"]
)
def test_every_figure_is_whole_and_every_name_is_told_from_the_others(names: list[str], width: int):  # fmt: skip
    figures = [
        [f"{400 * i}", f"0.{i:04}", f"{i:08.4f}", f"+0.{i:04} [-0.0{i:03}, +0.0{i:03}] ≈", "4"] for i in range(12)
    ]
    rows = [[name, *row] for name, row in zip(names, figures, strict=True)]
    table = FittedTable(title="t", headings=["name", *HEADINGS], rows=rows)
    text = printed(table, width)
    assert all(len(line) <= width for line in text.splitlines())
    lines = [re.sub(r"\s+", " ", line) for line in text.splitlines()]
    for row in figures:
        for figure in row[:-1]:  # the last column is equal, and said once
            assert any(re.search(rf"(^| ){re.escape(figure)}( |$)", line) for line in lines), figure
    assert "".join(HEADINGS[2].split("_")) in re.sub(r"[\s_]", "", text) or width < 200
    starts = {line.split(" ")[0] for line in lines if "[" in line}
    assert len(starts) == len(set(names)) or width == 45  # the interval fills the line there
    assert (LIGHTNING[0] in text) == (width == 200) or names is not LIGHTNING


def test_common_parts_end_where_no_number_is_divided():
    assert without_common_parts(["checkpoint-1000", "checkpoint-1500"]) == (["1000", "1500"], "checkpoint-*")
    assert without_common_parts(["a/step=100.ckpt", "a/step=200.ckpt"]) == (["100", "200"], "a/step=*.ckpt")
    assert without_common_parts(["x=1.75.pt", "x=2.75.pt"]) == (["1.75", "2.75"], "x=*.pt")
    assert without_common_parts(["c/1/model.safetensors", "c/2/model.safetensors"])[0] == ["1", "2"]
    for same in (["a.pt"], ["a.pt", "a.pt"], ["a", "b"], []):
        assert without_common_parts(same) == (same, "")


def test_names_are_shortened_in_the_middle_to_different_texts():
    names = ["run-1-of-the-long-experiment", "run-2-of-the-long-experiment", "run-2-of-the-other-experiment"]
    for width in (8, 16, 20, 28):
        short = shortened(names, width)
        assert all(len(name) <= width for name in short)
        assert len(set(short)) == 3 or width == 8
        assert all(name.startswith("r") and name.endswith("t") for name in short)
    assert shortened(names, 40) == names


def test_an_interval_and_a_figure_with_its_unit_stay_on_one_line():
    text = (
        "Better than last on test data: +0.0391 [+0.0085, +0.0918], to swa -0.0073 [-0.0375, +0.0207]. It took 12.5 s."
    )
    for width in range(30, 120):
        lines = printed(Sentence(text, indent=2), width).splitlines()
        assert all(len(line) <= width for line in lines)
        assert " ".join(line.strip() for line in lines) == text
        for whole in ("+0.0391 [+0.0085, +0.0918],", "-0.0073 [-0.0375, +0.0207].", "12.5 s."):
            assert any(whole in line for line in lines), (width, whole)


def test_a_path_that_is_longer_than_a_line_is_shortened():
    (line,) = printed(Sentence("/a/very/long/path/" + "x" * 90 + "/averaged.safetensors"), 60).splitlines()
    assert len(line) == 60 and line.startswith("/a/very/long") and line.endswith("/averaged.safetensors")
