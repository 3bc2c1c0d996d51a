"""Landscape report for a terminal."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from ckptavg.errors import decimal, printable
from ckptavg.report.plane import Mark, Plane
from ckptavg.report.result import Landscape

_SHADES: Final = " ░▒▓█"
_COLUMNS: Final = 78
_ROWS: Final = 22
_NUMBERS: Final = "123456789abcdefghijklmnopqrstuvwxyz"  # of the candidates; further ones are "+"


def render(landscape: Landscape) -> Iterator[RenderableType]:
    """Yield the quadratic, its prediction quality, the plane and the written files."""
    q, values, plane = landscape.surrogate, landscape.eigenvalues, landscape.plane
    yield Text(f"loss at the mean of {q.n} candidates: {decimal(q.value)}; curvature: {q.curvature}")
    if values:
        below = sum(value < 0 for value in values)
        negative = f", {below} of them below 0" if below else ""
        yield Text(f"eigenvalues from {values[0]:.4g} to {values[-1]:.4g}{negative}")
    fit = f"Spearman {landscape.spearman:.3f}, R² {landscape.r_squared:.3f}"
    yield Text(f"on {len(landscape.measured)} random mixtures: {fit}", style="bold")
    if plane is not None:
        yield from (Text(), *map(Text, data(plane)), _Map(plane), *_legend(plane), Text())
    for output in landscape.outputs:
        yield Text(f"wrote {printable(str(output.path))}: {output.bytes:,} bytes", style="dim")


def data(plane: Plane) -> list[str]:
    """Return two lines: which loss was measured, and on how much data."""
    points = f"{len(plane.x)} × {len(plane.y)} points"
    norms = "" if plane.statistics is None else f"; BatchNorm from about as many {plane.statistics} examples"
    return [
        f"loss of {printable(plane.source.rpartition('/')[2])} on {plane.split} data, at {points}",
        f"each on {plane.examples:,} of {plane.of:,} examples{norms}",
    ]


def spaced(side: Sequence[float], count: int) -> list[float]:
    """Return ``count`` equally spaced values from the first to the last of ``side``."""
    return [side[0] + (side[-1] - side[0]) * i / (count - 1) for i in range(count)]


def interpolated(plane: Plane, x: Sequence[float], y: Sequence[float]) -> Any:
    """Return losses between the measured points, a row per y: smooth, and never beyond those of the points around.

    It is the tensor product of monotone cubic interpolation (PCHIP): other splines overshoot at a steep wall, which
    draws islands that do not exist.
    """
    from scipy.interpolate import PchipInterpolator

    rows = PchipInterpolator(plane.y, plane.losses, axis=0)(y)
    return PchipInterpolator(plane.x, rows, axis=1)(x)


class _Map:
    """The plane as shades of five equal parts of the measured losses, a character being twice as high as wide."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        x, y = self._plane.x, self._plane.y
        wide, high = x[-1] - x[0], y[-1] - y[0]
        columns = min(options.max_width, _COLUMNS, max(20, round(2 * _ROWS * wide / high)))
        rows = max(4, round(columns * high / wide / 2))
        bounds = _bounds(self._plane)
        cells = [
            [_SHADES[sum(loss > bound for bound in bounds[:-1])] for loss in row]
            for row in interpolated(self._plane, spaced(x, columns), spaced(y, rows)).tolist()
        ]

        def cell(mark: Mark) -> tuple[int, int]:
            return round((mark.y - y[0]) / high * (rows - 1)), round((mark.x - x[0]) / wide * (columns - 1))

        path = [cell(mark) for mark in self._plane.candidates]
        for (row, column), (to_row, to_column) in pairwise(path):
            steps = max(abs(to_row - row), abs(to_column - column)) or 1
            for i in range(1, steps):
                cells[row + round(i * (to_row - row) / steps)][column + round(i * (to_column - column) / steps)] = "·"
        corners = [cell(mark) for mark in self._plane.mixtures]
        for (row, column), sign in zip([*path, *corners], [*_numbered(self._plane), *"ABC"], strict=True):
            cells[row][column] = sign
        for number, row in reversed([*enumerate(cells)]):
            text = Text("".join(row), no_wrap=True)
            for corner in (column for at, column in corners if at == number):
                text.stylize("reverse", corner, corner + 1)
            yield text


def _numbered(plane: Plane) -> list[str]:
    return [_NUMBERS[i] if i < len(_NUMBERS) else "+" for i in range(len(plane.candidates))]


def _bounds(plane: Plane) -> list[float]:
    """Return the upper bounds of the shades: quantiles of the measured losses."""
    losses = sorted(loss for row in plane.losses for loss in row)
    return [losses[max(0, len(losses) * i // len(_SHADES) - 1)] for i in range(1, len(_SHADES) + 1)]


def _legend(plane: Plane) -> Iterator[Text]:
    bounds, steps = [min(map(min, plane.losses)), *_bounds(plane)], [mark.name for mark in plane.candidates]
    shades = (f"{shade} {decimal(bound)}" for shade, bound in zip(_SHADES[1:], bounds[1:], strict=False))
    yield Text(f"blank from {decimal(bounds[0])}, {', '.join(shades)} to {decimal(bounds[-1])}")
    named = (f"{letter} {mark.name} {decimal(mark.loss)}" for letter, mark in zip("ABC", plane.mixtures, strict=True))
    yield Text(printable("   ".join(named)))
    if len(steps) > 1:
        farthest = max(mark.distance for mark in plane.candidates)
        span = f"{_NUMBERS[0]} to {_numbered(plane)[-1]}: candidates of steps {steps[0]} to {steps[-1]}"
        yield Text(f"{span}, projected from up to {farthest:.3g} away")
    wide, high = plane.x[-1] - plane.x[0], plane.y[-1] - plane.y[0]
    yield Text(f"{wide:.3g} by {high:.3g} in ‖w − w′‖₂, one scale for both axes; A to B is the first")
