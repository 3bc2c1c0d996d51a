"""Comparison of several strategies on the same candidates and the same evaluator."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from ckptavg.cost import Cost
from ckptavg.errors import UsageError, counted
from ckptavg.objective import Learned, Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.options import Options
from ckptavg.pipeline.basin import basin_note
from ckptavg.pipeline.expectation import expect
from ckptavg.pipeline.preflight import check_format, check_space, check_strategy, dry_run_plan
from ckptavg.pipeline.result import blank_result, build_result
from ckptavg.pipeline.session import open_session
from ckptavg.pipeline.verdict import Verdict, figure, loss_on_test, on_test, scores_of, unbiased_hint
from ckptavg.pipeline.writing import write_output
from ckptavg.report import interval
from ckptavg.report.result import Comparison, Gain, StrategyResult
from ckptavg.runtime.progress import Watch
from ckptavg.score import DATA, Score, Split, valid
from ckptavg.strategies import from_spec, name_of

REFERENCE: Final = "last"
DEFAULT: Final = (REFERENCE, "best", "swa", "lawa", "ema", "soup", "aswa", "sewa", "twa")
_ON_TRAIN: Final = ("twa:on=train",)  # added if the task has training data as well as validation data


@dataclass(frozen=True)
class _Run:
    """Finished run of a strategy, with its validation score."""

    name: str
    strategy: Strategy
    learned: Learned
    score: Score
    cost: Cost


def compare(
    paths: Sequence[Path], options: Options, watch: Watch | None = None, *, names: Sequence[str] = ()
) -> Comparison:
    """Run strategies on the checkpoints under ``paths`` and write the average with the best validation score.

    Each strategy runs as if alone: with the same random numbers and batches, and charged for every score it requests,
    cached or not. `last` is always included, so the winner is never worse on validation data than no averaging. Ties
    go to the lower loss, then to the earlier strategy in the list. Test data are used only after the decision.

    Args:
        names: strategies with settings, in the syntax of `ckptavg.strategies.from_spec`; empty runs every strategy the
            task allows.
    Raises:
        CkptavgError: on any expected failure; nothing is written then.
    """
    check_format(options)
    with open_session(paths, options, watch) as this:
        evaluator = this.scored("compare scores every strategy, so it needs a task file, --val or --score-cmd")
        strategies = _parse_strategies(names, evaluator)
        if options.dry_run:
            plan = [f"would compare {', '.join(strategies)}", *dry_run_plan(this.checkpoints, options)]
            result = blank_result(this.found, strategies[REFERENCE], options, plan)
            return Comparison(**vars(result), winner="", strategies=())
        check_space(this.checkpoints, options)
        expect(this, evaluator, strategies)
        evaluator.prepare()
        runs: list[_Run] = []
        for name, strategy in strategies.items():
            this.run.progress("strategies", len(runs), len(strategies))
            with this.run.progress.prefixed(name):
                evaluator.restart(repr(strategy))
                learned = strategy.learn(evaluator)
                score = evaluator.exact_score(learned.coefficients, evaluator.scored_on)
            runs.append(_Run(name, strategy, learned, score, evaluator.cost()))
        winner = max(runs, key=lambda run: (run.score.value, -(run.score.loss or 0.0)))
        valid(winner.score)
        evaluator.restart()
        for split in evaluator.splits:
            evaluator.prefetch([run.learned.coefficients for run in runs], split, exact=True)
        reference = next(scores_of(run.learned.coefficients, evaluator) for run in runs if run.name == REFERENCE)
        results = [_strategy_result(run, reference, evaluator) for run in runs]
        written = write_output(this, winner.learned.coefficients, winner.strategy)
        verdict = _verdict(results, results[runs.index(winner)], evaluator, options)
        judgement = Verdict(winner.learned.coefficients, verdict=verdict)
        result = build_result(this, winner.strategy, winner.learned, judgement, written)
        note = basin_note(evaluator, strategies.values(), [run.learned.coefficients for run in runs], paths)
        warnings = [*result.warnings, *([note] if note else [])]
        return Comparison(
            **vars(replace(result, cost=winner.cost, warnings=warnings)), winner=winner.name, strategies=results
        )


def _parse_strategies(names: Sequence[str], evaluator: Evaluator) -> Mapping[str, Strategy]:
    """Return name → strategy, including `last`; all settings are checked before the first strategy runs."""
    n = evaluator.n
    if not names:
        has_train = evaluator.losses is not None and evaluator.has("train") and evaluator.scored_on != "train"
        names = [*DEFAULT, *(_ON_TRAIN if has_train else ())]
        names = [name if _fits(from_spec(name), n) else f"{name}:k={n}" for name in names]
    elif REFERENCE not in names:
        names = [REFERENCE, *names]
    strategies = {name: from_spec(name) for name in names}
    for name, strategy in strategies.items():
        try:
            check_strategy(strategy, n, evaluator)
        except UsageError as error:
            raise UsageError(f"{name}: {error}", hint=error.hint) from error
    return strategies


def _fits(strategy: Strategy, n: int) -> bool:
    """Return whether the default settings fit the number of candidates: K may be larger."""
    try:
        strategy.check(n, ("train", "val"), bounded=True)
    except UsageError:
        return False
    return True


def _strategy_result(run: _Run, reference: Mapping[Split, Score], evaluator: Evaluator) -> StrategyResult:
    coefficients = run.learned.coefficients
    scores = scores_of(coefficients, evaluator)
    return StrategyResult(
        name=run.name, strategy=name_of(run.strategy),
        settings=asdict(run.strategy),  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
        coefficients=[coefficients.candidate(i) for i in range(evaluator.n)],
        groups=coefficients.groups, used=len(coefficients.selected), scores=scores,
        over_last={split: _gain(split, score, reference[split]) for split, score in scores.items()},
        cost=run.cost, notes=run.learned.notes,
    )  # fmt: skip


def _gain(split: Split, score: Score, reference: Score) -> Gain:
    """Return the difference, without an interval on data on which strategies chose: it would be no evidence."""
    if split == "test":
        return interval.gain(score, reference)
    others = {name: _gain(split, other, reference.others[name]) for name, other in score.others.items()}
    return Gain(value=score.value - reference.value, reason="the strategies chose on these data", others=others)


def _verdict(
    contestants: Sequence[StrategyResult], winner: StrategyResult, evaluator: Evaluator, options: Options
) -> str:
    split = evaluator.scored_on
    if winner.name == REFERENCE:
        text = f"No strategy scores above the last candidate on {DATA[split]} data, so the last candidate was written."
        return f"{text}{higher_on_test(contestants, winner)}"
    won = f"{winner.name} wins on {DATA[split]} data with {figure(winner.scores[split])}"
    if gain := winner.over_last.get("test"):
        reference = next(contestant for contestant in contestants if contestant.name == REFERENCE)
        text = on_test(winner.scores["test"], gain, "the last candidate")
        text += loss_on_test(winner.scores["test"], reference.scores["test"], gain)
        return f"{won}. {text}{higher_on_test(contestants, winner)}"
    difference = f"{winner.over_last[split].value:+.4f} against last on the data it was chosen on"
    return f"{won}: {difference}. {unbiased_hint(options, split)}"


def higher_on_test(contestants: Sequence[StrategyResult], winner: StrategyResult) -> str:
    """Return a sentence if strategies score above the winner on test data, which do not decide."""
    value = {contestant.name: contestant.scores["test"].value for contestant in contestants if "test" in winner.scores}
    higher = [contestant for contestant in contestants if value and value[contestant.name] > value[winner.name]]
    if not higher:
        return ""
    top = max(higher, key=lambda contestant: value[contestant.name])
    gain = interval.gain(top.scores["test"], winner.scores["test"])
    more = f"; {counted(len(higher) - 1, 'other')} too" if len(higher) > 1 else ""
    noise = f", but the best of {len(contestants)} may be so by chance" if gain.separated else ", within noise"
    return f" {top.name} scores higher on test data{'' if gain.low is None else noise}: {gain}{more}."
