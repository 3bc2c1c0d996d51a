"""Verdict: the selection compared with the best single candidate and the plain averages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptavg.coefficients import Coefficients
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.report import interval
from ckptavg.report.digits import figure_texts
from ckptavg.report.result import Gain
from ckptavg.score import DATA, METRIC, Score, Split, valid
from ckptavg.strategies.last import Last
from ckptavg.strategies.lawa import LAWA
from ckptavg.strategies.swa import SWA

if TYPE_CHECKING:
    from ckptavg.objective.evaluator import Evaluator
    from ckptavg.options import Options
    from ckptavg.pipeline.session import Session


@dataclass(frozen=True)
class Verdict:
    """Coefficients to write and the scores behind them; see `ckptavg.report.result.Result` for the fields."""

    coefficients: Coefficients
    singles: Sequence[Score] = ()
    baselines: Mapping[str, Mapping[Split, Score]] = field(default_factory=dict)
    best_step: int | None = None
    verdict: str = ""
    gains: Mapping[str, Gain] = field(default_factory=dict)
    worse: bool = False
    replaced: bool = False
    by_loss: str = ""  # the sentence of `verdict` on the loss, where that orders otherwise than the metric
    same: Collection[str] = ()  # baselines with the coefficients of the selection, or of an earlier baseline


def judge(this: Session, evaluator: Evaluator, strategy: Strategy, selection: Coefficients) -> Verdict:
    """Score the selection, every candidate alone, and unless disabled last, SWA and LAWA with as many candidates.

    All scores are of exact averages, whatever the precision of the search. ``--never-worse`` replaces the selection by
    the best single candidate if that scores higher.

    Raises:
        TaskError: if the coefficients to write have no valid score, or no single candidate has one.
    """
    options, n, split = this.options, evaluator.n, evaluator.scored_on
    if not (options.baselines or options.never_worse):
        return Verdict(selection, verdict="Not compared with anything (--no-baselines).")
    alone = Coefficients.singles(n)
    evaluator.prefetch(alone, split, exact=True)
    singles: list[Score] = []
    for i, single in enumerate(alone):
        singles.append(evaluator.exact_score(single, split))
        evaluator.progress("scoring candidates", i + 1, n)
    best = max(range(n), key=lambda i: (singles[i].value, i))
    valid(singles[best])  # raises if no candidate has a valid score
    rivals = {"best": alone[best]}
    if options.baselines:
        k = len(selection.selected)
        plain = {"last": Last(), "swa": SWA()} | ({f"lawa-{k}": LAWA(k=k)} if 1 < k < n else {})  # lawa-1 is last
        rivals |= {name: average.coefficients(n) for name, average in plain.items()}
    for each in evaluator.splits:
        evaluator.prefetch([*rivals.values(), selection], each, exact=True)
    baselines = {name: scores_of(coefficients, evaluator) for name, coefficients in rivals.items()}
    earlier = [selection, *rivals.values()]
    same = [name for i, (name, rival) in enumerate(rivals.items(), 1) if rival in earlier[:i]]
    chosen = evaluator.exact_score(selection, split)
    step, worse = this.checkpoints[best].step, chosen.value < singles[best].value
    rival = figure(singles[best], chosen)
    figures = f"{figure(chosen, singles[best])}, the best single candidate (step {step}) {rival}"
    if worse and options.never_worse:
        verdict = f"WORSE than a single candidate: the selection has {figures}. That checkpoint was written instead."
        baselines["selection"] = scores_of(selection, evaluator)
        return Verdict(alone[best], singles, baselines, step, verdict, worse=worse, replaced=True)
    valid(chosen)
    order = "WORSE than a" if worse else "No better than a" if chosen.value == singles[best].value else "Above every"
    # a plain average is chosen on no data, but the single candidate that it is compared with is
    learned = not isinstance(strategy, PlainAverage)
    where = "on the data it was chosen on" if learned else f"on {DATA[split]} data"
    verdict = f"{order} single candidate {where}: the selection has {figures}."
    if worse:
        verdict += " --never-worse would write that one."
    above = [name for name, scores in baselines.items() if scores[split].value > chosen.value]
    if plain := [name for name in above if name not in ("best", "last", *same)]:
        verdict += (
            f" Plain {' and '.join(plain)} scored higher than the selection{', without any search' if learned else ''}."
        )
    sentence = by_loss(chosen, singles, singles[best], [checkpoint.step for checkpoint in this.checkpoints], split)
    verdict += sentence
    if learned and not worse and "test" not in evaluator.splits:
        verdict += f" {unbiased_hint(options, split)}"
    return Verdict(selection, singles, baselines, step, verdict, worse=worse, same=same, by_loss=sentence)


def with_test(verdict: Verdict, written: Mapping[Split, Score], split: Split) -> Verdict:
    """Return the verdict on test data, if ``written``, the scores of the file, include them.

    The file is compared with the best single candidate, the last one and the better plain average, the better on
    ``split``, so that test data decide nothing; the text leaves out `Verdict.same`. A selection worse than a single
    candidate on ``split`` stays WORSE.
    """
    if "test" not in written or verdict.replaced:
        return verdict
    rivals = verdict.baselines
    gains = {name: interval.gain(written["test"], scores["test"]) for name, scores in rivals.items()}
    plain = sorted(rivals.keys() - {"best", "last", *verdict.same}, key=lambda name: rivals[name][split].value)
    shown = [name for name in ("best", "last", *plain[-1:]) if name in gains and name not in verdict.same]
    if not shown:
        return replace(verdict, gains=gains)
    names = {"best": f"the best single candidate (step {verdict.best_step})", "last": "the last candidate"}
    score, gain = written["test"], gains[shown[0]]
    text = on_test(score, gain, names.get(shown[0], shown[0]))
    if others := [f"to {name} {gains[name]}" for name in shown[1:]]:
        text += f" Difference {', '.join(others)}."
    text += loss_on_test(score, rivals[shown[0]]["test"], gain)
    text = f"{verdict.verdict} {text}" if verdict.worse else f"{text}{verdict.by_loss}"
    return replace(verdict, gains=gains, verdict=text)


def on_test(score: Score, gain: Gain, rival: str) -> str:
    """Return the sentence that compares ``score`` with that of ``rival`` on test data."""
    name = "loss (+ is lower)" if score.metric is None else score.name
    where = "on test data" + ("" if name == METRIC else f" by {name}")
    order = "Not distinguishable from" if not gain.separated else "Better than" if gain.value > 0 else "WORSE than"
    return f"{'Difference to' if gain.low is None else order} {rival} {where}: {gain}."


def loss_on_test(score: Score, reference: Score, gain: Gain) -> str:
    """Return a sentence on the test loss if its order of ``score`` and ``reference`` is not that of ``gain``."""
    if score.metric is None or score.loss is None or reference.loss is None or score.loss == reference.loss:
        return ""
    order = "lower" if score.loss < reference.loss else "higher"
    if order == ("lower" if gain.value > 0 else "higher") and gain.value != 0:
        return ""
    own, other = figure_texts([score, reference], "loss")
    return f" But its test loss is {order}: {own}, against {other}."


def by_loss(chosen: Score, singles: Sequence[Score], best: Score, steps: Sequence[int], split: Split) -> str:
    """Return a sentence on the loss if its order of the selection and the single candidates is not the metric's."""
    losses = [single.loss for single in singles if single.loss is not None]
    if chosen.metric is None or chosen.loss is None or len(losses) < len(singles):
        return ""
    lowest = losses.index(min(losses))
    own, alone = figure_texts([chosen, singles[lowest]], "loss")
    if chosen.loss < losses[lowest] and chosen.value <= best.value:
        return f" But its {DATA[split]} loss, {own}, is lower than that of every single candidate."
    if chosen.loss > losses[lowest] and chosen.value > best.value:
        return f" But its {DATA[split]} loss, {own}, is higher than that of step {steps[lowest]} alone, {alone}."
    return ""


def unbiased_hint(options: Options, split: Split) -> str:
    """Return how to get a score on data that no choice depends on."""
    if options.score_cmd is not None or options.lm_eval is not None:
        return "For an unbiased score, score the file once on data that the search has not seen."
    if split == "train":
        return "A test_dataloader() gives an unbiased score."
    return "--holdout 0.5 keeps half of the validation examples for an unbiased score."


def scores_of(coefficients: Coefficients, evaluator: Evaluator) -> Mapping[Split, Score]:
    """Return the exact scores on the evaluator's splits."""
    return {split: evaluator.exact_score(coefficients, split) for split in evaluator.splits}


def figure(score: Score, *compared: Score) -> str:
    """Return the number that decides, with its name and the decimals that tell it from the scores ``compared`` to."""
    name = "loss" if score.metric is None else score.name
    return f"{name} {figure_texts([score, *compared], name)[0]}"
