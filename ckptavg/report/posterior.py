"""Result of ``swag``: the scores of averaged predictions beside those of single models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import RenderableType
from rich.text import Text

from ckptavg.errors import counted
from ckptavg.report.digits import ERROR, figure_column
from ckptavg.report.layout import FittedTable
from ckptavg.report.result import Output, Result
from ckptavg.score import DATA, Score, Split


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Score of the averaged predictions of some models on a split; its ``loss`` is the NLL.

    Attributes:
        models: the number of models, each of which takes a pass over the data.
        bins: of a reliability diagram, each with its ends ``low`` and ``high``, the number of ``examples`` whose
            confidence is in it, and their mean ``confidence`` and ``accuracy``; empty without class probabilities.
    """

    models: int
    score: Score
    bins: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class PosteriorResult(Result):
    """Result of ``swag``.

    Attributes:
        gaussian: the settings of the Gaussian: ``scale``, ``deviations``, ``covariance``, ``seed``.
        spread: relative standard deviation ‖σ‖/‖w̄‖; None if nothing was drawn.
        predictions: split → ``last``, ``swa`` and ``swag``, the average over draws → its figures.
        draws: the files of ``--samples``.
        posterior: the file of ``--posterior``.
    """

    kind: ClassVar[str] = "posterior"

    gaussian: Mapping[str, Any]
    spread: float | None = None
    predictions: Mapping[Split, Mapping[str, Predictions]] = field(
        default_factory=dict[Split, Mapping[str, Predictions]]
    )
    draws: Sequence[Output] = ()
    posterior: Output | None = None


def predictions_tables(result: PosteriorResult) -> Iterator[RenderableType]:
    """Yield one table for each split: NLL and the metrics of class probabilities by model."""
    for split, models in result.predictions.items():
        names = ["loss", *(name for name in ("accuracy", "brier", "ece") if name in models["swa"].score.others)]
        columns = [figure_column([predictions.score for predictions in models.values()], name) for name in names]
        rows = [
            [_name(name, result, predictions.models), *(cells[i] for cells, _ in columns)]
            for i, (name, predictions) in enumerate(models.items())
        ]
        yield Text()
        yield FittedTable(
            title="", headings=[f"predictions, {DATA[split]} data", "nll", *names[1:]], rows=rows,
            foot=[ERROR, *(error for _, error in columns)],
        )  # fmt: skip


def _name(name: str, result: PosteriorResult, models: int) -> str:
    return f"swag: {counted(models, 'draw')}, scale {result.gaussian['scale']:g}" if name == "swag" else name
