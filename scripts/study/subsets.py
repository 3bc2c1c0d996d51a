"""Score every average of K candidates: the rank of a selection, and the spread among selections.

Shape suffixes: N = candidates, K = chosen.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ckptavg.coefficients import EVERYTHING, Coefficients
from ckptavg.objective.mixture import Mixture
from study.job import Job
from study.record import Row


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """The validation losses of all subsets.

    Attributes:
        losses: subset → loss.
        seconds: time to score them; epochs likewise.
    """

    losses: dict[tuple[int, ...], float]
    seconds: float
    epochs: float | None

    def rank(self, coefficients: Sequence[float], k: int) -> int | None:
        """Return the rank, 1 for the best subset; None if the mixture is not a uniform average of K."""
        chosen = tuple(i for i, c in enumerate(coefficients) if c != 0)
        if chosen not in self.losses or any(coefficients[i] != 1 / k for i in chosen):
            return None
        return 1 + bisect_left(sorted(self.losses.values()), self.losses[chosen])


def enumerated(mixture: Mixture, k: int) -> Subsets:
    """Score all subsets of ``k`` candidates on validation data, BatchNorm statistics recomputed for each."""
    mixture.restart()
    losses: dict[tuple[int, ...], float] = {}
    for subset in itertools.combinations(range(mixture.n), k):
        loss = mixture.score(Coefficients.uniform(subset, mixture.n)).loss
        assert loss is not None
        losses[subset] = loss
    cost = mixture.cost()
    return Subsets(losses=losses, seconds=cost.seconds, epochs=cost.epochs)


def figure(mixture: Mixture, job: Job, coefficients: Coefficients) -> float:
    """Return the domain's test figure of a mixture."""
    if job.figure is None:
        return mixture.score(coefficients, "test").value
    row_GN = mixture.losses.uniform().new_tensor(coefficients.values)
    mixture.mixed.candidates.materialize(row_GN, EVERYTHING)
    mixture.scoring.recompute_batchnorm()
    return job.figure(mixture.mixed.model)


def row_of(mixture: Mixture, job: Job, label: str, spec: str, coefficients: Coefficients) -> Row:
    """Score a mixture and return its row."""
    val, test = mixture.score(coefficients).loss, mixture.score(coefficients, "test").loss
    assert val is not None and test is not None
    return Row(
        label=label,
        spec=spec,
        used=len(coefficients.selected),
        val_loss=val,
        test_loss=test,
        figure=figure(mixture, job, coefficients),
        coefficients=coefficients.values[0],
    )


def drawn(subsets: Subsets, count: int, seed: int) -> list[tuple[int, ...]]:
    """Draw distinct subsets at random."""
    order = torch.randperm(len(subsets.losses), generator=torch.Generator().manual_seed(seed)).tolist()
    everything = list(subsets.losses)
    return [everything[i] for i in order[:count]]
