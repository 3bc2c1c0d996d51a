"""Landscape report for a terminal, and its plane as an image."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ckptavg.report.result import Landscape, Plane

_SHADES = " ░▒▓█"


def render(landscape: Landscape) -> Iterator[RenderableType]:
    """Yield the quadratic, its prediction quality and the plane as text."""
    q, values, plane, output = landscape.surrogate, landscape.eigenvalues, landscape.plane, landscape.output
    yield Text(f"loss at the mean of {q.n} candidates: {q.value:.4f}; curvature: {q.curvature}")
    if values:
        below = sum(value < 0 for value in values)
        negative = f", {below} of them below 0" if below else ""
        yield Text(f"eigenvalues from {values[0]:.4g} to {values[-1]:.4g}{negative}")
    fit = f"Spearman {landscape.spearman:.3f}, R² {landscape.r_squared:.3f}"
    yield Text(f"on {len(landscape.measured)} random mixtures: {fit}", style="bold")
    if plane is not None:
        yield from (Text(), _map(plane))
    if output is not None:
        yield Text(f"wrote {output.path}: {output.bytes:,} bytes", style="dim")


def _map(plane: Plane) -> Table:
    low, high = min(map(min, plane.losses)), max(map(max, plane.losses))
    across, up = plane.names[1:]
    title = f"loss from {low:.4f} ({_SHADES[-1]}) to {high:.4f} (blank); across to {across}, up to {up}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False, padding=0)
    for row in reversed(plane.losses):
        shades = (_SHADES[round((high - loss) / (high - low or 1) * (len(_SHADES) - 1))] * 2 for loss in row)
        table.add_row("".join(shades))
    return table


def draw(plane: Plane, path: Path) -> bool:
    """Draw the plane as a PNG at ``path``; return False if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    subplots: Any = pyplot.subplots
    figure, axes = subplots(figsize=(6, 5), layout="constrained")
    filled = axes.contourf(plane.u, plane.v, plane.losses, levels=20, cmap="viridis_r")
    axes.contour(plane.u, plane.v, plane.losses, levels=20, colors="black", linewidths=0.3)
    for name, (u, v) in zip(plane.names, ((0, 0), (1, 0), (0, 1)), strict=True):
        axes.plot(u, v, "o", color="white", markeredgecolor="black")
        axes.annotate(name, (u, v), textcoords="offset points", xytext=(6, 6), color="black")
    axes.set(xlabel=f"from {plane.names[0]} to {plane.names[1]}", ylabel=f"from {plane.names[0]} to {plane.names[2]}")
    figure.colorbar(filled, label="validation loss")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
