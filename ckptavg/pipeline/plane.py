"""Losses on the plane through three mixtures, in coordinates whose unit is a distance of weights.

Shape suffixes: N = candidates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective.mixture import Mixture
from ckptavg.objective.scoring import Scoring
from ckptavg.report.plane import Mark, Plane
from ckptavg.score import Score, valid

_MARGIN: Final = 0.15  # beyond the outermost marks, as a fraction of their larger extent
_FLAT: Final = 1e-4  # a triangle is refused whose height is this fraction of its longest side, or less


@dataclass(frozen=True)
class Axes:
    """Orthonormal axes of a plane: the first mixture is the origin, and the second lies on the first axis.

    Attributes:
        origin_N: coefficients of the first mixture.
        across_N, up_N: sum to 0, and move the weights by a distance of 1 in orthogonal directions.
        gram_NN: ⟨w_i − w̄, w_j − w̄⟩ over the parameters.
    """

    origin_N: Tensor
    across_N: Tensor
    up_N: Tensor
    gram_NN: Tensor

    @classmethod
    def through(cls, a_N: Tensor, b_N: Tensor, c_N: Tensor, gram_NN: Tensor) -> Self | None:
        """Return the axes by Gram–Schmidt; None if the three mixtures lie on a line."""

        def length(off_N: Tensor) -> float:
            return math.sqrt(max(0.0, float(off_N @ gram_NN @ off_N)))

        longest = max(length(b_N - a_N), length(c_N - a_N), length(c_N - b_N))
        if length(b_N - a_N) <= _FLAT * longest:
            return None
        across_N = (b_N - a_N) / length(b_N - a_N)
        up_N = c_N - a_N - (c_N - a_N) @ gram_NN @ across_N * across_N
        return None if length(up_N) <= _FLAT * longest else cls(a_N, across_N, up_N / length(up_N), gram_NN)

    def mark(self, name: str, row_N: Tensor, loss: float | None = None) -> Mark:
        """Return the projection of a mixture onto the plane."""
        off_N = row_N - self.origin_N
        x, y = (float(off_N @ self.gram_NN @ axis_N) for axis_N in (self.across_N, self.up_N))
        above = float(off_N @ self.gram_NN @ off_N) - x * x - y * y
        return Mark(name=name, x=x, y=y, distance=math.sqrt(max(0.0, above)), loss=loss)

    def at(self, x: float, y: float) -> Coefficients:
        """Return the coefficients of the mixture at (x, y)."""
        row_N = self.origin_N + x * self.across_N + y * self.up_N
        return Coefficients((tuple((row_N / row_N.sum()).tolist()),))


def scores_by_loss(evaluator: Mixture, scoring: Scoring, mixtures: Sequence[Coefficients]) -> Iterator[Score]:
    """Yield the scores of mixtures on the data to score on; TaskError if one is not finite."""
    split = evaluator.scored_on
    scoring.prefetch(mixtures, split, exact=True)
    for mixture in mixtures:
        yield valid(scoring.find(mixture, split, exact=True), evaluator.task.source)


def measured_plane(
    evaluator: Mixture, corners: dict[str, Coefficients], steps: Sequence[int], *, grid: int, examples: int, of: int
) -> Plane:
    """Measure the loss on a square grid that covers the three mixtures and the projections of all candidates.

    Args:
        corners: the three mixtures by name.
        steps: the candidates' steps.
        grid: number of points along the longer side.
        examples: number of examples, of the ``of`` examples there are.
    Raises:
        UsageError: if the three mixtures lie on a line.
    """
    rows = [torch.tensor(coefficients.values[0], dtype=torch.float64) for coefficients in corners.values()]
    a_N, b_N, c_N = rows
    differences = evaluator.mixed.candidates.differences()
    gram_NN = torch.stack([(off_NC @ off_NC.t()).cpu().double() for off_NC, _ in differences]).sum(dim=0)
    axes = Axes.through(a_N, b_N, c_N, gram_NN)
    if axes is None:
        message = f"--mixtures {','.join(corners)}: these three averages lie on a line, so they span no plane"
        raise UsageError(message, hint="name others, such as last,swa,soup")
    candidates = [axes.mark(str(step), torch.eye(evaluator.n, dtype=torch.float64)[i]) for i, step in enumerate(steps)]
    marks = [*(axes.mark(name, row_N) for name, row_N in zip(corners, rows, strict=True)), *candidates]
    x, y = _ticks([mark.x for mark in marks], [mark.y for mark in marks], grid)
    mixtures = [*corners.values(), *(axes.at(u, v) for v in y for u in x)]
    losses: list[float] = []
    seen = 0
    for score in scores_by_loss(evaluator, evaluator.sampled(examples), mixtures):
        assert score.loss is not None and score.examples is not None  # a score of losses
        losses.append(score.loss)
        seen = score.examples
        evaluator.progress("scoring the plane", len(losses), len(mixtures))
    named, points = losses[: len(rows)], losses[len(rows) :]
    return Plane(
        mixtures=[axes.mark(*corner) for corner in zip(corners, rows, named, strict=True)],
        candidates=candidates, x=x, y=y,
        losses=[points[start : start + len(x)] for start in range(0, len(points), len(x))],
        source=evaluator.task.source, split=evaluator.scored_on, examples=seen, of=of,
        statistics=evaluator.statistics_from,
    )  # fmt: skip


def _ticks(x: Sequence[float], y: Sequence[float], grid: int) -> tuple[list[float], list[float]]:
    """Return coordinates along both sides, equally far apart, that cover the marks at ``x`` and ``y``."""
    larger = max(max(x) - min(x), max(y) - min(y))
    step = larger * (1 + 2 * _MARGIN) / (grid - 1)
    sides: list[list[float]] = []
    for marks in (x, y):
        count = 1 + math.ceil((max(marks) - min(marks) + 2 * _MARGIN * larger) / step - 1e-9)
        middle = (max(marks) + min(marks)) / 2
        sides.append([middle + (i - (count - 1) / 2) * step for i in range(count)])
    return sides[0], sides[1]
