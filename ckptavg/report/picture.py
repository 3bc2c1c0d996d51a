"""The plane of a landscape as an image: losses in colour, the mixtures, and the candidates in training order."""

import importlib.util
import io
from typing import Any, Final, TypeAlias

from ckptavg.errors import decimal
from ckptavg.report.landscape import data, interpolated, spaced
from ckptavg.report.plane import Plane

SUFFIXES: Final = (".png", ".svg", ".pdf")
LISTED: Final = ".png, .svg or .pdf"
MISSING: Final = "matplotlib is not installed (pip install 'ckptavg[plot]')"
Sizes: TypeAlias = tuple[str, str] | tuple[float, float]
_SIZES: Final = ("small", "x-small")
_PIXELS: Final = 300  # along the longer side, between the measured points
_OFFSETS: Final = ((7, 5), (7, -12), (-7, 5), (-7, -12), (0, 9), (0, -16), (16, 14), (-16, 14))  # of a label, in points


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(plane: Plane, kind: str) -> bytes:
    """Return the image as a file of the ``kind`` png, svg or pdf.

    Colours follow the square root of the loss above the least one, so that the contours of a quadratic bowl are evenly
    spaced. They are interpolated between the measured points, which are marked by dots; both axes have one scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide, high = plane.x[-1] - plane.x[0], plane.y[-1] - plane.y[0]
    scale = 6.5 / max(wide, high)
    figure: Any = Figure(figsize=(max(wide * scale, 4) + 1.8, max(high * scale, 2.5) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure, plane)
    figure.axes[0].set_title("\n".join(data(plane)), fontsize="medium", parse_math=False)
    image = io.BytesIO()
    figure.savefig(image, format=kind, dpi=150)
    return image.getvalue()


def paint(figure: Any, plane: Plane, *, pixels: int = _PIXELS, narrow: bool = False, sizes: Sizes = _SIZES) -> None:
    """Draw the plane into a figure of matplotlib.

    Args:
        pixels: of the colours, along the longer side.
        sizes: of the labels of mixtures and of candidates.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    lowest, highest = min(map(min, plane.losses)), max(map(max, plane.losses))
    wide, high = plane.x[-1] - plane.x[0], plane.y[-1] - plane.y[0]
    axes: Any = figure.add_subplot()
    sides = [spaced(side, round(pixels * (side[-1] - side[0]) / max(wide, high))) for side in (plane.x, plane.y)]
    fine, norm = interpolated(plane, *sides), PowerNorm(0.5, lowest, highest)
    extent = (plane.x[0], plane.x[-1], plane.y[0], plane.y[-1])
    colours = axes.imshow(fine, norm=norm, cmap="viridis_r", origin="lower", extent=extent, interpolation="bilinear")
    if highest > lowest:
        levels = [lowest + (highest - lowest) * (i / 12) ** 2 for i in range(1, 12)]
        axes.contour(*sides, fine, levels=levels, colors="black", linewidths=0.3, alpha=0.6)
    measured = [(x, y) for y in plane.y for x in plane.x]
    axes.plot(*zip(*measured, strict=True), ".", color="black", ms=1.5, alpha=0.5, label="measured points")
    axes.plot(
        [mark.x for mark in plane.candidates], [mark.y for mark in plane.candidates], "o-", color="white", ms=4,
        lw=0.7, mec="black", mew=0.5, label="candidates by step, projected onto the plane",
    )  # fmt: skip
    for mark, shape in zip(plane.mixtures, "s^D", strict=True):
        label = f"{mark.name}: {decimal(mark.loss)}"
        axes.plot(mark.x, mark.y, shape, color="tab:red", mec="black", mew=0.8, ms=8, ls="none", label=label, zorder=4)
    first, second, _ = (mark.name for mark in plane.mixtures)
    axes.set(xlabel=f"‖w − w′‖₂ from {first} to {second}", ylabel="‖w − w′‖₂ orthogonal to it", aspect="equal")
    side = {"location": "bottom", "aspect": 40} if narrow else {}
    figure.colorbar(colours, label=f"{plane.split} loss", ticks=MaxNLocator(4 if narrow else 8), format="%.4g", **side)
    figure.legend(loc="outside lower center", ncols=1 if narrow else 3, fontsize="small", frameon=False)
    _label(figure, axes, plane, sizes)


def _label(figure: Any, axes: Any, plane: Plane, sizes: Sizes) -> None:
    """Write the names beside the marks, where they cover no other name or mark; else a candidate's is left out."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # sets the layout
    marks = [*plane.mixtures, plane.candidates[-1], *plane.candidates[:-1]]
    taken = [axes.transData.transform((mark.x, mark.y)) for mark in marks]
    boxes: list[Any] = []
    for number, mark in enumerate(marks):
        mixture = number < len(plane.mixtures)
        style = {"fontsize": sizes[0], "fontweight": "bold"} if mixture else {"fontsize": sizes[1]}
        halo = [withStroke(linewidth=2, foreground="white")]
        for offset in _OFFSETS:
            across = "left" if offset[0] > 0 else "right" if offset[0] < 0 else "center"
            text = axes.annotate(
                mark.name,
                (mark.x, mark.y),
                offset,
                textcoords="offset points",
                ha=across,
                path_effects=halo,
                color="black",
                **style,
            )
            box = text.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(map(box.overlaps, boxes)) and not any(box.contains(*point) for point in taken):
                boxes.append(box)
                break
            text.remove()
