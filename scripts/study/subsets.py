"""Score every average of K candidates: the rank of a selection, and the spread among selections.

Shape suffixes: N = candidates, K = chosen.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ckptavg.coefficients import EVERYTHING, Coefficients
from ckptavg.objective.mixture import Mixture
from study.job import Job
from study.record import Row

Figures: TypeAlias = tuple[float, Mapping[str, float]]


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

    def rank(self, chosen: Sequence[int] | None) -> int | None:
        """Return the rank, 1 for the best subset; None if these candidates are not one of the subsets."""
        loss = None if chosen is None else self.losses.get(tuple(chosen))
        return None if loss is None else 1 + bisect_left(sorted(self.losses.values()), loss)


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


def figures(mixture: Mixture, job: Job, coefficients: Coefficients) -> Figures:
    """Return the domain's test figure of a mixture, and further ones by name."""
    if job.figure is None:
        return mixture.score(coefficients, "test").value, {}
    assert mixture.losses is not None, "every task of the study has a loss"
    row_GN = mixture.losses.uniform().new_tensor(coefficients.values)
    mixture.mixed.candidates.materialize(row_GN, EVERYTHING)
    mixture.scoring.recompute_batchnorm()
    return split(job.figure(mixture.mixed.model))


def split(found: float | Mapping[str, float]) -> Figures:
    """Return the first of several figures and the rest."""
    if not isinstance(found, Mapping):
        return found, {}
    (_, first), *others = found.items()
    return first, dict(others)


def row_of(mixture: Mixture, job: Job, label: str, spec: str, coefficients: Coefficients) -> Row:
    """Score a mixture and return its row."""
    val, test = mixture.score(coefficients).loss, mixture.score(coefficients, "test").loss
    assert val is not None and test is not None
    figure, also = figures(mixture, job, coefficients)
    return Row(label=label, spec=spec, val_loss=val, test_loss=test, figure=figure, also=also, **shape(coefficients))


def shape(coefficients: Coefficients) -> dict[str, Any]:
    """Return what a row keeps of its coefficients."""
    (row,) = coefficients.values
    return {
        "used": len(coefficients.selected),
        "chosen": coefficients.selected if coefficients.uniform_subset else None,
        "negative": -sum(c for c in row if c < 0),
    }


def drawn(n: int, k: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Draw distinct subsets of k at random."""
    random = torch.Generator().manual_seed(seed)
    found: set[tuple[int, ...]] = set()
    while len(found) < min(count, math.comb(n, k)):
        found.add(tuple(sorted(torch.randperm(n, generator=random)[:k].tolist())))
    return sorted(found)
