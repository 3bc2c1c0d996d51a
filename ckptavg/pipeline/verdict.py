"""Verdict: the selection compared with the best single candidate and the plain averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptavg.coefficients import Coefficients
from ckptavg.score import Score, Split, valid
from ckptavg.strategies.last import Last
from ckptavg.strategies.lawa import LAWA
from ckptavg.strategies.swa import SWA

if TYPE_CHECKING:
    from ckptavg.objective.evaluator import Evaluator
    from ckptavg.pipeline.session import Session


@dataclass(frozen=True)
class Verdict:
    """Coefficients to write and the scores behind them; see `ckptavg.report.result.Result` for the fields."""

    coefficients: Coefficients
    singles: Sequence[Score] = ()
    baselines: Mapping[str, Mapping[Split, Score]] = field(default_factory=dict)
    best_step: int | None = None
    verdict: str = ""
    worse: bool = False
    replaced: bool = False


def judge(this: Session, evaluator: Evaluator, selection: Coefficients) -> Verdict:
    """Score the selection, every candidate alone, and unless disabled last, SWA and LAWA with as many candidates.

    All scores are of exact averages, whatever the precision of the search. ``--never-worse`` replaces the selection by
    the best single candidate if that scores higher.

    Raises:
        TaskError: if the coefficients to write have no valid score, or no single candidate has one.
    """
    options, n = this.options, evaluator.n
    if not (options.baselines or options.never_worse):
        return Verdict(selection, verdict="Not compared with anything (--no-baselines).")
    alone = [Coefficients.uniform([i], n) for i in range(n)]
    evaluator.prefetch(alone, evaluator.scored_on, exact=True)
    singles: list[Score] = []
    for i, single in enumerate(alone):
        singles.append(evaluator.exact_score(single, evaluator.scored_on))
        evaluator.progress("scoring candidates", i + 1, n)
    best = max(range(n), key=lambda i: (singles[i].value, i))
    valid(singles[best])  # raises if no candidate has a valid score
    rivals = {"best": alone[best]}
    if options.baselines:
        k = len(selection.selected)
        plain = {"last": Last(), "swa": SWA()} | ({f"lawa-{k}": LAWA(k=k)} if k < n else {})
        rivals |= {name: strategy.coefficients(n) for name, strategy in plain.items()}
    for split in evaluator.splits:
        evaluator.prefetch([*rivals.values(), selection], split, exact=True)
    baselines = {name: scores_of(coefficients, evaluator) for name, coefficients in rivals.items()}
    chosen = evaluator.exact_score(selection, evaluator.scored_on)
    step, worse = this.checkpoints[best].step, chosen.value < singles[best].value
    figures = f"{_figure(chosen)}, the best single candidate (step {step}) {_figure(singles[best])}"
    if worse and options.never_worse:
        verdict = f"The selection scores below a single candidate: {figures}. That checkpoint was written instead."
        baselines["selection"] = scores_of(selection, evaluator)
        return Verdict(alone[best], singles, baselines, step, verdict, worse, replaced=True)
    valid(chosen)
    if worse:
        verdict = f"WORSE than a single candidate: the selection scores {figures}. --never-worse would write that one."
    elif chosen.value == singles[best].value:
        verdict = f"No better than a single candidate: the selection scores {figures}."
    else:
        verdict = f"Better than every single candidate: the selection scores {figures}."
    above = [name for name, scores in baselines.items() if scores[evaluator.scored_on].value > chosen.value]
    if plain := [name for name in above if name not in ("best", "last")]:
        verdict += f" Plain {' and '.join(plain)} scored higher than the selection, without any search."
    return Verdict(selection, singles, baselines, step, verdict, worse)


def scores_of(coefficients: Coefficients, evaluator: Evaluator) -> Mapping[Split, Score]:
    """Return the exact scores on the evaluator's splits."""
    return {split: evaluator.exact_score(coefficients, split) for split in evaluator.splits}


def _figure(score: Score) -> str:
    return f"loss {-score.value:.4f}" if score.metric is None else f"{score.metric:.4f}"
