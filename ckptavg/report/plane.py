"""Measured losses on a plane through mixtures, as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass

from ckptavg.score import Split


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a plane: a mixture that spans it, or a candidate's projection onto it.

    Attributes:
        name: the strategy of a mixture; the step of a candidate.
        distance: distance ‖w − w′‖₂ of a candidate from its projection.
        loss: loss of a mixture, on the examples of the plane; None for a candidate.
    """

    name: str
    x: float
    y: float
    distance: float = 0.0
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Measured losses on the plane through three mixtures.

    Attributes:
        mixtures: the three: the first at the origin, the second at (x, 0).
        candidates: the candidates, in training order.
        x, y: coordinates of the measured points: distances ‖w − w′‖₂ along two orthogonal directions.
        losses: a row per y, a column per x.
        source: the task, whose loss it is.
        split: the data of the losses.
        examples: the number of examples that each point was measured on, ``of`` those of the split.
        statistics: the split that BatchNorm's statistics were recomputed on, from about as many examples; None if the
            model has none.
    """

    mixtures: Sequence[Mark]
    candidates: Sequence[Mark]
    x: Sequence[float]
    y: Sequence[float]
    losses: Sequence[Sequence[float]]
    source: str
    split: Split
    examples: int
    of: int
    statistics: Split | None
