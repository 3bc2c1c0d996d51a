"""Interface of a scorer of mixtures: an objective for strategies, plus exact scores and costs for the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ckptavg.cost import Cost
from ckptavg.objective import Objective
from ckptavg.report.result import MatrixResult
from ckptavg.score import Score, Split

if TYPE_CHECKING:
    from torch import Tensor

    from ckptavg.candidates import ReadInto
    from ckptavg.coefficients import Coefficients
    from ckptavg.readers import StoredTensor


class Evaluator(Objective, Protocol):
    """Scores mixtures of candidates: `objective.mixture.Mixture` or `objective.command.CommandEvaluator`.

    Attributes:
        splits: splits of the final scores, `scored_on` first.
        bounded: True if scores have known bounds, so that scoring can stop early.
        statistics: names of the tensors recomputed from data for every mixture: BatchNorm's running statistics.
        averaged_buffers: names of floating-point buffers that differ between candidates, and are averaged.
        matrix: properties of the candidate matrix that was searched; None if there is no matrix.
        notes: remarks on the measurements for the report, one sentence each.
    """

    splits: tuple[Split, ...]
    bounded: bool

    @property
    def statistics(self) -> Collection[str]: ...  # noqa: D102
    @property
    def averaged_buffers(self) -> Collection[str]: ...  # noqa: D102
    @property
    def matrix(self) -> MatrixResult | None: ...  # noqa: D102
    @property
    def notes(self) -> Sequence[str]: ...  # noqa: D102

    def has(self, split: Split) -> bool:
        """Return whether ``split`` exists."""
        ...

    def score_batches(self, split: Split) -> int | None:
        """Return the forward batches of a score; 1 if it has none; None while that is unknown without reading data."""
        ...

    def prepare(self) -> None:
        """Load model and candidates, so that no strategy is charged for loading."""

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None, *, exact: bool = False) -> None:
        """See `Objective.prefetch`; ``exact`` announces calls of `exact_score`."""

    def exact_score(self, coefficients: Coefficients, split: Split) -> Score:
        """Return the score of the exact average of the files, whatever the precision of the search; cached."""
        ...

    def load_output(self, specs: Mapping[str, StoredTensor], read_into: ReadInto) -> Mapping[str, Tensor]:
        """Load the output file before it is finished; return tensors by name, recomputed `statistics` among them."""
        ...

    def score_output(
        self, coefficients: Coefficients, specs: Mapping[str, StoredTensor], read_into: ReadInto
    ) -> Mapping[Split, Score]:
        """Return the scores of the complete output file, the average with ``coefficients``, in a fresh model.

        Raises:
            TaskError: if they differ from those of the search by more than rounding, or more than noise if the data
                change from pass to pass.
        """
        ...

    def restart(self, search: str = "") -> None:
        """Start a new search: reset the random generator, the batch streams and the cost.

        ``search`` describes the strategy and its settings: losses of the journal are those of equal searches. Known
        scores are kept; `cost` charges for them as if they were measured again.
        """

    def cost(self) -> Cost:
        """Return the cost since the start, or since the last `restart`."""
        ...
