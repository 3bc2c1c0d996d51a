"""Improve a subset of K by swaps of one member for another candidate, the likeliest to help first.

Shape suffixes: N = candidates.
"""

from collections.abc import Callable, Sequence

import torch

from ckptavg.coefficients import Coefficients
from ckptavg.objective import Losses
from ckptavg.objective.selection import Selection
from ckptavg.score import Split

STAGE = "swapping candidates"
PATIENCE = 16  # swaps without an improvement after which a descent ends: more found nothing (scripts/benchmark)


class SwapSearch:
    """Descents by swaps from several subsets, within one budget.

    Args:
        selection: has the scores, and decides which of two mixtures is better.
        values: returns a number for each candidate, given a subset: swaps that raise their sum are tried, the largest
            rise first.
        budget: the most scores; `gradients` has the most calls of ``values``.
        stage: shown while it scores.
    """

    def __init__(
        self, selection: Selection, values: Callable[[Coefficients], Sequence[float]], budget: int,
        stage: str = STAGE,
    ) -> None:  # fmt: skip
        self._selection = selection
        self._values = values
        self._stage, self._budget, self.left = stage, budget, budget
        self._moves = gradients(budget)

    def descend(self, start: Coefficients) -> None:
        """Take the first of the likeliest swaps that improves ``start``, and so on until none of `PATIENCE` does."""
        mask = start if self._scored(start) else None
        while mask is not None and self._moves > 0 and self.left > 0:
            self._moves -= 1
            mask = self._improved(mask)

    def _improved(self, mask: Coefficients) -> Coefficients | None:
        for out, new in rising(mask, self._values(mask))[:PATIENCE]:
            swapped = Coefficients.uniform([new if i == out else i for i in mask.selected], mask.n)
            if self._scored(swapped) and (rank := self._selection.ranking())(swapped) > rank(mask):
                return swapped
        return None

    def _scored(self, mask: Coefficients) -> bool:
        """Score a subset if the budget allows; return whether it is scored."""
        if mask not in self._selection.scores and self.left > 0:
            self.left -= 1
            self._selection.score([mask], self._stage, self._budget)
        return mask in self._selection.scores


def is_subset(mixture: Coefficients, k: int) -> bool:
    """Return whether a mixture is the plain mean of ``k`` candidates."""
    return len(mixture.selected) == k and mixture.uniform_subset


def answer(selection: Selection, k: int) -> tuple[Coefficients, list[str]]:
    """Return the best of all scored mixtures, and notes: what decided, and if the answer is no mean of ``k``."""
    best = selection.best()
    notes = [note] if (note := selection.note(best)) else []
    if not is_subset(best, k):
        mask = max((mixture for mixture in selection.scores if is_subset(mixture, k)), key=selection.ranking())
        kind = "a single candidate" if len(best.selected) == 1 else f"the mean of all {best.n} candidates"
        figures, others = selection.figures(best), selection.figures(mask)
        notes.append(f"asked for the mean of {k}, but the answer is {kind}: {figures}, the best mean of {k} {others}")
    return best, notes


def rising(mask: Coefficients, values: Sequence[float]) -> list[tuple[int, int]]:
    """Return the swaps (out, in) that raise the sum of ``values``, the largest rise first; ties to later candidates."""
    inside = set(mask.selected)
    swaps = [(i, j) for i in mask.selected for j in range(mask.n) if j not in inside and values[j] > values[i]]
    return sorted(swaps, key=lambda swap: (values[swap[0]] - values[swap[1]], swap[0], -swap[1]))


def gradients(budget: int) -> int:
    """Return how many gradients a search with a budget of scores may take: accepted swaps are one in four or fewer."""
    return 3 + budget // 4


def falling_loss(losses: Losses, mask: Coefficients, on: Split) -> list[float]:
    """Return −∂F/∂c at a mask, [N], the mean over as many batches as a pass has.

    Replacing candidate i by j changes the loss by (∂F/∂c_j − ∂F/∂c_i)/K to first order: one pass ranks all swaps.
    """
    c_N = losses.uniform().new_tensor(mask.values[0])
    total_N = torch.zeros_like(c_N)
    for _ in range(losses.batches(on)):
        leaf_N = c_N.clone().requires_grad_()
        (gradient_N,) = torch.autograd.grad(losses.loss(leaf_N, on), leaf_N)
        total_N -= gradient_N
    return total_N.tolist()
