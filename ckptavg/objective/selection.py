"""The mixtures that a search has scored, and the choice among them by loss or by metric."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import counted, decimal
from ckptavg.objective import Objective, SelectBy
from ckptavg.score import Score, difference_error

AGREEING: Final = 0.3  # rank correlation from which the loss is taken as a witness of the metric
CLOSE: Final = 0.01  # fraction of the lowest loss within which the metric may choose
CLEAR: Final = 4.0  # standard errors for a metric to overrule the loss: by chance 1 in 1,000 of 30 with many examples
_FEW: Final = 5  # mixtures below which a rank correlation says nothing


class Selection:
    """Scored mixtures by coefficients, in the order in which they were scored.

    ``loss`` chooses the lowest loss, ``metric`` the best metric (ties: the lower loss). ``auto`` is ``loss`` if loss
    and metric rank all scored mixtures alike, else ``metric``. The loss is the quieter of the two on few examples, so
    the metric decides only if Spearman's correlation is below `AGREEING` by more than its standard error (a dozen
    mixtures that hardly differ have any correlation by chance), or if the best metric is above that of the lowest loss
    by more than `CLEAR` standard errors of the difference: many poor candidates can rank alike while, among the best,
    the loss misses what the metric measures. By loss, ``auto`` prefers mixtures whose metric is at
    least that of every single candidate and of the mean of all, if their loss is within `CLOSE` of the lowest, or if
    the lowest is that of one of these. By metric, it prefers the mean of all if its loss is lower and its metric is
    below the best by less than the standard error of the difference: of many noisy values one is high by chance. So an
    answer is never worse than a single candidate or the mean in both, but for that fraction or error.

    References:
        Breiman, Friedman, Olshen & Stone 1984, Classification and regression trees, section 3.4.3 (one standard error).

    Attributes:
        scores: coefficients → score.
        plain: the single candidates, and the plain averages that an answer is measured by.
        mean: that of all candidates, in ``plain``.
    """

    def __init__(self, objective: Objective, select_by: SelectBy = "auto") -> None:
        self._objective = objective
        self._select_by: SelectBy = select_by
        self.scores: dict[Coefficients, Score] = {}
        self._done: dict[str, int] = {}  # stage → scores
        n = objective.n
        self.mean = Coefficients.uniform(range(n), n)
        self.plain = [*Coefficients.singles(n), self.mean]

    def score(self, mixtures: Iterable[Coefficients], stage: str = "", total: int = 0) -> None:
        """Score mixtures that are not scored yet; ``stage``, with ``total`` scores, is shown if it has a name."""
        missing = [mixture for mixture in dict.fromkeys(mixtures) if mixture not in self.scores]
        self._objective.prefetch(missing)
        for mixture in missing:
            self.scores[mixture] = self._objective.score(mixture)
            done = self._done[stage] = self._done.get(stage, 0) + 1
            if stage:
                self._objective.progress(stage, done, max(total, done), loss=self.loss(mixture))

    def loss(self, mixture: Coefficients) -> float:
        """Return the loss of a scored mixture, or minus its score if it has none; smaller is better."""
        score = self.scores[mixture]
        return -score.value if score.invalid or score.loss is None else score.loss

    @property
    def by(self) -> Literal["loss", "metric"]:
        """The criterion that decides now: a task has a loss, a metric or both, and ``auto`` depends on the scores."""
        scores = self.scores.values()
        has_loss = any(score.loss is not None for score in scores)
        has_metric = any(score.metric is not None or score.loss is None for score in scores)
        if not (has_loss and has_metric):
            return "metric" if has_metric else "loss"
        if self._select_by != "auto":
            return self._select_by
        agreement, error = _agreement(scores)
        alike = agreement is not None and agreement + error >= AGREEING
        return "loss" if alike and self._lead() <= CLEAR else "metric"

    def _lead(self) -> float:
        """Return by how many standard errors the best metric is above that of the lowest loss; 0 if unknown."""
        known = [score for score in self.scores.values() if score.loss is not None and not score.invalid]
        highest, lowest = max(known, key=lambda score: score.value), min(known, key=lambda score: score.loss or 0.0)
        error = difference_error(highest, lowest)
        return (highest.value - lowest.value) / error if error > 0 else 0.0

    def ranking(self) -> Callable[[Coefficients], tuple[float, float]]:
        """Return the key by which scored mixtures are ranked now; larger is better."""
        by = self.by
        return lambda mixture: (self.scores[mixture].value if by == "metric" else 0.0, -self.loss(mixture))

    def best(self, among: Collection[Coefficients] | None = None) -> Coefficients:
        """Return the best of the scored mixtures, or of those ``among`` them; ties go to the first scored."""
        mixtures = [mixture for mixture in self.scores if among is None or mixture in among]
        first = max(mixtures, key=self.ranking())
        plain = [self.scores[mixture].value for mixture in self.plain if mixture in self.scores]
        if not plain or self._select_by != "auto":
            return first
        if self.by == "metric":
            return self.mean if self.mean in mixtures and self._mean_is_as_good_as(first) else first
        limit = math.inf if first in self.plain else self.loss(first) + CLOSE * abs(self.loss(first))
        searched = [m for m in mixtures if m not in self.plain and self.loss(m) <= limit]
        as_good = [m for m in searched if self.scores[m].value >= max(plain)]
        return min(as_good, key=self.loss, default=first)

    def _mean_is_as_good_as(self, first: Coefficients) -> bool:
        """Return whether the mean has less loss, as good a metric but for noise, and no plain average above both."""
        score, loss = self.scores[self.mean], self.loss(self.mean)
        others = [self.scores[other] for other in self.plain if other in self.scores]
        beaten = any(other.value > score.value and other.loss is not None and other.loss < loss for other in others)
        close = self.scores[first].value - score.value < difference_error(self.scores[first], score)
        return close and loss < self.loss(first) and not beaten

    def figures(self, mixture: Coefficients) -> str:
        """Return the metric and the loss of a scored mixture in words."""
        return ", ".join(f"{name} {decimal(value)}" for name, value in self.scores[mixture].figures.items())

    def note(self, chosen: Coefficients | None = None, *, loss: str = "loss", among: str = "") -> str:
        """Return the sentence for the report that says what decided and why; empty if nothing else could have.

        Args:
            chosen: the mixture that was chosen.
            loss: the name of the loss that chose it, if a loss did.
            among: the scored mixtures and their number in words.
        """
        scores, by = list(self.scores.values()), self.by
        name = next((score.name for score in scores if score.metric is not None and score.loss is not None), None)
        if name is None:
            only = "loss" if by == "loss" else "score"
            return f"--select-by {self._select_by}: the task has a {only} alone" if self._select_by != "auto" else ""
        many = f"among {among or counted(len(scores), 'scored mixture')}"
        if self._select_by != "auto":
            return f"chosen by {name if by == 'metric' else by} (--select-by) {many}"
        agreement, error = _agreement(scores)
        if agreement is None:
            return f"chosen by {name} {many}: too few to say whether the loss agrees"
        alike = agreement + error >= AGREEING
        verb = ("ranks" if agreement >= AGREEING else "may rank") if alike else "does not rank"
        reason = f"the loss {verb} them like {name} (Spearman {agreement:.2f} ± {error:.2f})"
        if alike and by == "metric":
            reason += f", but at the lowest loss {name} is {self._lead():.1f} standard errors below the best"
        if by == "loss" and chosen and self.loss(chosen) > min(map(self.loss, self.scores)):
            what = f"by loss, of those whose {name} is at least that of every plain average,"
        elif by == "metric" and chosen and self.scores[chosen].value < max(score.value for score in scores):
            what = f"by {name}, which is higher by less than its standard error elsewhere,"
        else:
            what = f"by {loss if by == 'loss' else name}"
        return f"chosen {what} {many}: {reason}; --select-by decides otherwise"


def _agreement(scores: Collection[Score]) -> tuple[float | None, float]:
    """Return Spearman's correlation of −loss and metric, and its standard error 1/√(M − 1) without any agreement.

    The correlation is None for fewer than `_FEW` mixtures, and 1 if all have the same metric.
    """
    known = [(score.value, -score.loss) for score in scores if score.loss is not None and not score.invalid]
    if len(known) < _FEW:
        return None, 0.0
    values, losses = zip(*known, strict=True)
    return 1.0 if len(set(values)) == 1 else spearman(values, losses), 1 / math.sqrt(len(known) - 1)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation; ties share their mean rank."""
    x, y = _centred_ranks(a), _centred_ranks(b)
    size = x.norm() * y.norm()
    return float(x @ y / size) if size > 0 else 0.0


def _centred_ranks(values: Sequence[float]) -> Tensor:
    v = torch.tensor(values, dtype=torch.float64)
    ranks = (v[:, None] > v[None]).sum(dim=1) + ((v[:, None] == v[None]).double().sum(dim=1) - 1) / 2
    return ranks - ranks.mean()
