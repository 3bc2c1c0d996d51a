"""Winner of a comparison: the choice between the strategies, and the verdict on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from ckptavg.coefficients import Coefficients
from ckptavg.cost import Cost
from ckptavg.errors import counted, decimal
from ckptavg.objective import Learned, PlainAverage, SelectBy, Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.objective.selection import Selection
from ckptavg.options import Options
from ckptavg.pipeline.verdict import figure, loss_on_test, on_test, unbiased_hint
from ckptavg.report import interval
from ckptavg.report.digits import figure_places, figure_texts
from ckptavg.report.result import StrategyResult
from ckptavg.score import DATA, Score, Split

REFERENCE: Final = "last"
SelectedBy: TypeAlias = Literal["held-out loss", "loss", "metric"]


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """Finished run of a strategy, with its validation score."""

    name: str
    strategy: Strategy
    learned: Learned
    score: Score
    cost: Cost

    @property
    def held_out(self) -> float | None:
        """See `StrategyResult.held_out`."""
        plain = isinstance(self.strategy, PlainAverage) and not self.score.invalid
        return self.score.loss if plain else self.learned.held_out

    def cross_validated(self, scored_on: Split) -> bool:
        """Return whether the strategy chose by held-out loss, though its answer may be a mixture that has none."""
        settings, one_value = vars(self.strategy), math.isinf(self.score.loss_noise)
        fits = settings.get("solver") == "quadratic" and settings.get("ridge") in (None, "auto") and not one_value
        return self.learned.held_out is not None or (fits and settings["on"] in (None, scored_on))


def choose(
    runs: Sequence[FinishedRun], singles: Sequence[Score], evaluator: Evaluator, select_by: SelectBy
) -> tuple[FinishedRun, SelectedBy, str]:
    """Return the winner, the figure that it was chosen by, and a sentence on why that figure decides.

    The answers, and the single candidates if a strategy scored them, decide between loss and metric, see `Selection`;
    the best strategy by that wins, ties to the lower loss. If ``auto`` takes the loss and a strategy has
    cross-validated, the lowest held-out loss wins instead, among those that have one: a fitted loss is no rival to it.
    """
    selection = Selection(evaluator, select_by)
    for run in runs:
        selection.scores.setdefault(run.learned.coefficients, run.score)
    for single, score in zip(Coefficients.singles(evaluator.n), singles, strict=False):
        selection.scores.setdefault(single, score)
    many = len(selection.scores)
    among = f"{many:,} single candidates and answers" if singles else counted(many, "answer")
    held_out = [(run.held_out, i) for i, run in enumerate(runs) if run.held_out is not None]
    crossed = any(run.cross_validated(evaluator.scored_on) for run in runs)
    if selection.by == "loss" and select_by == "auto" and crossed and held_out:
        return runs[min(held_out)[1]], "held-out loss", selection.note(loss="held-out loss", among=among)
    rank = selection.ranking()
    best = max(runs, key=lambda run: rank(run.learned.coefficients))
    return best, selection.by, selection.note(among=among)


def verdict_of(
    rows: Sequence[StrategyResult], winner: StrategyResult, by: SelectedBy, split: Split, options: Options
) -> str:
    """Return the winner, its difference to the last candidate, its scores by split, and rivals that are above it."""
    reference = next(row for row in rows if row.name == REFERENCE)
    above = f"{_passed_over(rows, winner, by, split)}{higher_on_test(rows, winner)}{lower_loss_on_test(rows, winner)}"
    if winner is reference:
        what = "" if by == "metric" else f" by {by}"
        text = f"No strategy scores above the last candidate on {DATA[split]} data{what}"
        return f"{text}, so the last candidate was written.{above}"
    score, last = winner.scores[split], reference.scores[split]
    won = f"{winner.name} wins on {DATA[split]} data with "
    own, other = figure_texts([score, last], "loss")
    won += figure(score, last) if by == "metric" else f"loss {own}" if by == "loss" else _held_out(winner, score)
    if (gain := winner.over_last.get("test")) is None:
        difference = f"{winner.over_last[split].text(_places(score, last))} against last"
        if by != "metric":
            difference = f"{other} for last"
        return f"{won}: {difference} on the data it was chosen on. {unbiased_hint(options, split)}{above}"
    test = winner.scores["test"]
    text = on_test(test, gain, "the last candidate") + loss_on_test(test, reference.scores["test"], gain)
    number = figure(test).rpartition(" ")[2]
    return f"{won}. {text} It has {figure(score)} on {DATA[split]} data and {number} on test data.{above}"


def _held_out(winner: StrategyResult, score: Score) -> str:
    places = figure_places([score], "loss")
    fitted = "it was chosen on no data" if winner.chose_on is None else f"fitted: {decimal(score.loss, places=places)}"
    return f"held-out loss {decimal(winner.held_out, places=places)} ({fitted})"


def _places(score: Score, other: Score) -> int:
    """Return the decimals of the difference of two scores, or two losses if there is no metric."""
    return figure_places([score, other], "loss" if score.metric is None else score.name)


def _passed_over(rows: Sequence[StrategyResult], winner: StrategyResult, by: SelectedBy, split: Split) -> str:
    """Return a sentence on the best strategy by each figure of the scored data that did not decide."""
    own, valid_rows = winner.scores[split], [row for row in rows if not row.scores[split].invalid]
    highest = max(valid_rows, key=lambda row: row.scores[split].value)
    losses = {row.name: loss for row in valid_rows if (loss := row.scores[split].loss) is not None}
    rivals: list[str] = []
    if own.metric is not None and highest.scores[split].value > own.value:
        rivals.append(f"{highest.name} with {figure(highest.scores[split], own)}")
    if by == "held-out loss" and (lowest := min(losses, key=lambda name: losses[name])) != winner.name:
        least = next(row.scores[split] for row in valid_rows if row.name == lowest)
        rivals.append(f"{lowest} with loss {figure_texts([least, own], 'loss')[0]}")
    return f" Passed over on {DATA[split]} data: {', '.join(rivals)}." if rivals else ""


def lower_loss_on_test(rows: Sequence[StrategyResult], winner: StrategyResult) -> str:
    """Return a sentence if the lowest test loss is below the winner's by two standard errors, where metrics are scored.

    The errors of the two losses are added as if they were of different examples: per example only the metric is kept.
    """
    tests = {row.name: row.scores["test"] for row in rows if "test" in winner.scores}
    losses = {name: score.loss for name, score in tests.items() if score.loss is not None and not score.invalid}
    own, lowest = tests.get(winner.name), min(losses, key=lambda name: losses[name], default=winner.name)
    if own is None or own.metric is None or own.loss is None or lowest == winner.name:
        return ""
    noise = 2 * math.hypot(own.loss_noise, tests[lowest].loss_noise)
    if own.loss - losses[lowest] <= noise:
        return ""
    least, other = figure_texts([tests[lowest], own], "loss")
    return f" {lowest} has a clearly lower test loss: {least}, against {other}."


def _better(score: Score, other: Score) -> bool:
    """Return whether ``score`` is better by every figure that decides: value and loss."""
    lower = score.loss is None or other.loss is None or score.loss < other.loss
    return score.value > other.value and lower


def higher_on_test(rows: Sequence[StrategyResult], winner: StrategyResult) -> str:
    """Return a sentence if strategies score above the winner on test data, which do not decide."""
    value = {row.name: row.scores["test"].value for row in rows if "test" in winner.scores}
    higher = [row for row in rows if value and value[row.name] > value[winner.name]]
    if not higher:
        return ""
    top = max(higher, key=lambda row: value[row.name])
    gain = interval.gain(top.scores["test"], winner.scores["test"])
    more = f"; {counted(len(higher) - 1, 'other')} too" if len(higher) > 1 else ""
    noise = f", but the best of {len(rows)} may be so by chance" if gain.separated else ", within noise"
    split = next(iter(winner.scores))
    if gain.separated and split != "test" and _better(top.scores[split], winner.scores[split]):
        loss = decimal(top.held_out, places=figure_places([top.scores[split]], "loss"))
        known = f"a held-out loss of {loss}" if loss else "no held-out loss"
        noise = f", as on {DATA[split]} data, but it has {known}"
    return f" {top.name} scores higher on test data{'' if gain.low is None else noise}: {gain}{more}."
