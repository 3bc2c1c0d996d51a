"""Landscape report for a terminal, and its plane as an image."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ckptavg.report.result import Landscape, Plane

_SHADES = " ░▒▓█"


def render(landscape: Landscape) -> Group:
    """Render the quadratic, its prediction quality and the plane as text."""
    return Group(*_parts(landscape))


def draw(plane: Plane, path: Path) -> bool:
    """Draw the plane as a PNG at ``path``; return False if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure: Any
    axes: Any
    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
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


def _parts(landscape: Landscape) -> Iterator[RenderableType]:
    q, values = landscape.surrogate, landscape.eigenvalues
    yield Text(f"loss at the mean of {q.n} candidates: {q.value:.4f}; curvature: {q.curvature}")
    if values:
        below = sum(value < 0 for value in values)
        yield Text(
            f"eigenvalues from {values[0]:.4g} to {values[-1]:.4g}" + (f", {below} of them below 0" if below else "")
        )
    yield Text(
        f"on {len(landscape.measured)} random mixtures: "
        f"Spearman {landscape.spearman:.3f}, R² {landscape.r_squared:.3f}",
        style="bold",
    )
    if landscape.plane is not None:
        yield Text()
        yield _map(landscape.plane)
    if landscape.output is not None:
        yield Text(f"wrote {landscape.output.path}: {landscape.output.bytes:,} bytes", style="dim")


def _map(plane: Plane) -> Table:
    flat = [loss for row in plane.losses for loss in row]
    low, high = min(flat), max(flat)
    title = (
        f"loss from {low:.4f} ({_SHADES[-1]}) to {high:.4f} (blank); across to {plane.names[1]}, up to {plane.names[2]}"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False, padding=0)
    for row in reversed(plane.losses):
        shades = (_SHADES[round((high - loss) / (high - low or 1) * (len(_SHADES) - 1))] * 2 for loss in row)
        table.add_row("".join(shades))
    return table
