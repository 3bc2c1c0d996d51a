"""What the program asks of whatever scores mixtures: an objective for strategies, and an account for the report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ckptavg.cost import Cost
from ckptavg.objective import Objective
from ckptavg.report.result import MatrixResult
from ckptavg.score import Score, Split

if TYPE_CHECKING:
    from torch import Tensor

    from ckptavg.coefficients import Coefficients
    from ckptavg.readers import StoredTensor
from ckptavg.runtime.progress import Watch


class Evaluator(Objective, Protocol):
    """Candidates and a way to score their mixtures: `objective.mixture.Mixture`, `objective.command.Commanded`."""

    watch: Watch | None

    @property
    def splits(self) -> tuple[Split, ...]:
        """What the final scores are measured on, `scored_on` first."""
        ...

    @property
    def bounded(self) -> bool:
        """Whether scores lie within known bounds, so that they can be stopped early."""
        ...

    def has(self, split: Split) -> bool:
        """Whether there are such data."""
        ...

    @property
    def statistics(self) -> Collection[str]:
        """The tensors that are recomputed from data for every mixture: BatchNorm's statistics."""
        ...

    @property
    def matrix(self) -> MatrixResult | None:
        """The candidate matrix that was searched, None where there is none."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the report should know of how it was measured, a sentence each."""
        ...

    def step(self, i: int) -> int:
        """The training step of candidate ``i``."""
        ...

    def prepare(self) -> None:
        """Load what a search needs, so that no strategy is charged for it."""
        ...

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None, *, exact: bool = False) -> None:
        """See `Objective.prefetch`; ``exact`` if they will be asked for by `exact_score`."""
        ...

    def exact_score(self, coefficients: Coefficients, split: Split) -> Score:
        """The score of the exact average of the files, whatever the precision of the search; remembered."""
        ...

    def load_output(
        self,
        coefficients: Coefficients,
        specs: Mapping[str, StoredTensor],
        read_into: Callable[[str, int, memoryview], None],
    ) -> Mapping[str, Tensor]:
        """Take the file that is about to be written as it lies, the average of ``coefficients``.

        Returns:
            Its `statistics`, recomputed, to be put into it.
        """
        ...

    def score_output(self, coefficients: Coefficients, split: Split) -> Score:
        """The score of the file that was adopted with these ``coefficients``."""
        ...

    def restart(self) -> None:
        """Begin as a new search would: the seed's random numbers, nothing spent."""
        ...

    def cost(self) -> Cost:
        """What has been spent since the start, or the last `restart`."""
        ...
