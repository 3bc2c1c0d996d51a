"""A plane in characters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rich.console import Console, Group
from rich.text import Text

from ckptavg.report import picture
from ckptavg.report.landscape import _legend, _Map, data, interpolated, spaced  # pyright: ignore
from ckptavg.report.plane import Mark, Plane


def bowl(n: int = 5, candidates: int = 12) -> Plane:
    x, y = [float(i) for i in range(2 * n)], [float(i) for i in range(n)]
    marks = [Mark(name=name, x=u, y=v, loss=1.0) for name, u, v in (("last", 1, 1), ("swa", 5, 1), ("soup", 3, 3))]
    path = [Mark(name=str(100 * i), x=8 * math.cos(i / 8) + 0.9, y=3.9 * math.sin(i / 8)) for i in range(candidates)]
    return Plane(
        mixtures=marks, candidates=path, x=x, y=y, losses=[[(u - 4) ** 2 + (v - 2) ** 2 for u in x] for v in y],
        source="/a/task.py", split="val", examples=600, of=1000, statistics="train",
    )  # fmt: skip


@pytest.mark.parametrize("colour", [{"no_color": True}, {"force_terminal": True, "color_system": "truecolor"}])
@pytest.mark.parametrize("width", [80, 200, 40])
def test_the_map_has_all_marks_and_fits_any_terminal(width: int, colour: dict[str, object]):
    console = Console(width=width, record=True, file=open("/dev/null", "w"), **colour)  # type: ignore # noqa: SIM115, PTH123
    console.print(Group(_Map(bowl()), *map(Text, data(bowl())), *_legend(bowl())))
    console.file.close()
    lines = console.export_text().splitlines()
    columns = min(width, 78)
    rows = round(columns * 4 / 9 / 2)  # nine units wide and four high, a character being twice as high as wide
    assert [len(line) for line in lines[:rows]] == [columns] * rows and "loss of task.py" in lines[rows]
    assert max(map(len, lines)) <= width
    shown = set("".join(lines[:rows]))
    assert {*"ABC·░▒▓█ "} <= shown
    if width >= 80:
        assert {*"123456789abc"} <= shown and len(lines) == rows + 6  # no line of the caption is folded


def test_a_picture_is_drawn_of_one_candidate_of_many_and_of_a_constant_loss():
    for count in (1, 50):
        plane = bowl(candidates=count)
        assert picture.draw(replace(plane, losses=[[1.0] * 10] * 5), "png").startswith(b"\x89PNG")
        assert ("+" in "".join(str(text) for text in _legend(plane))) == (count == 50)


def test_interpolation_agrees_with_the_points_and_invents_no_extremes():
    plane = bowl()
    plane.losses[2][3] = 400.0  # type: ignore[index]  # a steep wall, at which a spline would overshoot
    fine = interpolated(plane, spaced(plane.x, 10 * 9 + 1), spaced(plane.y, 10 * 4 + 1))
    assert fine[::10, ::10].tolist() == [pytest.approx(row) for row in plane.losses]
    for i in range(4):
        for j in range(9):
            around = [plane.losses[v][u] for v in (i, i + 1) for u in (j, j + 1)]
            cell = fine[10 * i : 10 * i + 11, 10 * j : 10 * j + 11]
            assert min(around) - 1e-9 <= cell.min() and cell.max() <= max(around) + 1e-9
