"""Greedy soup: from the best candidate down, keep each one that improves the uniform average.

Shape suffixes: N = candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ckptavg.coefficients import Coefficients
from ckptavg.objective import SCORED_ALONE, Learned, Losses, Objective, Stage, Strategy, scored_alone
from ckptavg.score import Split


@dataclass(frozen=True, kw_only=True)
class GreedySoup(Strategy):
    """Add candidates by validation score, each only if the average improves strictly.

    Candidates are sorted by score, ties to the later one. The soup starts as the best candidate; each next candidate is
    added if the uniform average with it scores above the soup without it. On the data used for the choice the soup is
    never worse than the best single candidate. Costs N scores of single candidates and N − 1 of soups.

    References:
        Wortsman et al. 2022, Model Soups: Averaging Weights of Multiple Fine-tuned Models Improves Accuracy without
        Increasing Inference Time, arXiv:2203.05482, recipe 1. Its authors' code also requires strict improvements.
    """

    follows = True

    def stages(self, n: int, losses: Losses | None, scored_on: Split) -> Sequence[Stage]:
        """See `Strategy.stages`."""
        return (SCORED_ALONE, Stage("growing the soup", scores=n - 1))

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        n = objective.n
        alone = scored_alone(objective)
        best, *others = sorted(range(n), key=lambda i: (alone[i], i), reverse=True)
        chosen, value = [best], alone[best]
        tried = {best: value}
        for done, i in enumerate(others, 1):
            tried[i] = objective.score(Coefficients.uniform(sorted([*chosen, i]), n)).value
            if tried[i] > value:
                chosen, value = [*chosen, i], tried[i]
            objective.progress("growing the soup", done, len(others), score=value)
        decisions = ["keep" if i in chosen else "reject" for i in range(n)]
        columns = {"if added": [tried[i] for i in range(n)], "decision": decisions}
        return Learned(coefficients=Coefficients.uniform(chosen, n), columns=columns)


STRATEGY: type[Strategy] = GreedySoup
