"""Blend: the best point of the line through a single candidate and a plain average.

Shape suffixes: N = candidates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from ckptavg.coefficients import Coefficients
from ckptavg.objective import SCORED_ALONE, Learned, Losses, Objective, PlainAverage, Stage, Strategy
from ckptavg.score import Split
from ckptavg.strategies.ema import EMA
from ckptavg.strategies.lawa import LAWA
from ckptavg.strategies.swa import SWA

_GRID: Final = (0.0, 1.0, 0.5, 1.5, -0.5)  # the ends first: equal scores go to the first scored
_SCORES: Final = 7
_NEAR: Final = 0.01  # λ less than this apart need no score of their own
_STAGE: Final = "blending"


@dataclass(frozen=True, kw_only=True)
class Blend(Strategy):
    """Search the line through a candidate a and a plain average β̄: β = (1 − λ)·e_a + λ·β̄, −0.5 ≤ λ ≤ 1.5.

    λ = 0, 1, ½, 1½ and −½ are scored, then twice the vertex of the parabola through the best λ and its neighbours, at
    most seven scores in all. The best of these is returned, so on the data of the search the result is not worse than
    either end, nor than a single candidate that was scored (but see `ckptavg.objective.selection.Selection`). It needs
    scores only, no gradient, and a single number cannot overfit as N coefficients can.

    References:
        The line of WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903), with an average at one end; λ > 1 extrapolates.
    """

    anchor: Annotated[Literal["last", "best"], "Candidate at λ = 0."] = "best"
    towards: Annotated[Literal["swa", "lawa", "ema"], "Plain average at λ = 1, of default settings."] = "swa"
    select_by: Annotated[
        Literal["auto", "loss", "metric"], "Score that decides; auto: the loss if it ranks as the metric does."
    ] = "auto"

    def stages(self, n: int, losses: Losses | None, scored_on: Split) -> Sequence[Stage]:
        """See `Strategy.stages`."""
        return (*((SCORED_ALONE,) if self.anchor == "best" else ()), Stage(_STAGE, scores=_SCORES))

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        from ckptavg.objective.selection import Selection

        n, selection = objective.n, Selection(objective, self.select_by)
        singles = Coefficients.singles(n)[::-1]  # equal scores go to the later candidate
        if self.anchor == "best":
            selection.score(singles, SCORED_ALONE.name, n)
        anchor = max(singles, key=selection.ranking()) if self.anchor == "best" else singles[0]
        averages: Mapping[str, PlainAverage] = {"swa": SWA(), "lawa": LAWA(k=min(LAWA.k, n)), "ema": EMA()}
        average = averages[self.towards].coefficients(n)
        if anchor == average:
            return Learned(coefficients=average, notes=[f"the {self.anchor} candidate is the average itself"])
        selection.plain.append(average)
        points: dict[float, Coefficients] = {}

        def score(factors: Sequence[float]) -> None:
            mixtures = {factor: _between(anchor, average, factor) for factor in factors}
            selection.score(mixtures.values())
            points.update(mixtures)
            objective.progress(_STAGE, len(points), _SCORES, loss=selection.loss(selection.best(points.values())))

        score(_GRID)
        while len(points) < _SCORES:
            by_loss = selection.by == "loss"
            heights = {x: selection.loss(c) if by_loss else -selection.scores[c].value for x, c in points.items()}
            factor = _vertex(heights)
            if factor is None or min(abs(factor - x) for x in points) < _NEAR:
                break
            score([factor])
        best = selection.best()  # after the anchor was chosen, another single candidate may have become the best
        factors = [x for x, mixture in points.items() if mixture == best]
        title = f"(1 − λ)·{self.anchor} + λ·{self.towards}"
        rows = [{"λ": x} | selection.scores[points[x]].figures for x in sorted(points)]
        line = f"λ = {factors[0]:.3g} of {title}" if factors else f"a single candidate, not a point of {title}"
        notes = [line, selection.note(best)]
        return Learned(coefficients=best, notes=[note for note in notes if note], tables={title: rows})


def _between(start: Coefficients, end: Coefficients, factor: float) -> Coefficients:
    """Return (1 − factor)·start + factor·end, which is exactly ``start`` at 0 and ``end`` at 1."""
    pairs = zip(start.values[0], end.values[0], strict=True)
    return Coefficients((tuple((1 - factor) * a + factor * b for a, b in pairs),))


def _vertex(heights: Mapping[float, float]) -> float | None:
    """Return the lowest point of the parabola through the lowest of the points and its neighbours.

    The result lies between these; None if the parabola has no minimum.
    """
    x = sorted(heights)
    middle = min(range(len(x)), key=lambda i: heights[x[i]])
    left = min(max(middle - 1, 0), len(x) - 3)
    a, b, c = x[left : left + 3]
    slope = (heights[b] - heights[a]) / (b - a)
    bend = ((heights[c] - heights[b]) / (c - b) - slope) / (c - a)
    return min(max((a + b) / 2 - slope / (2 * bend), a), c) if 0 < bend < math.inf else None


STRATEGY: type[Strategy] = Blend
