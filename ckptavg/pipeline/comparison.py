"""Comparison of several strategies on the same candidates and the same evaluator."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.errors import TaskError, UsageError, counted
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.options import Options
from ckptavg.options.comparison import ComparisonOptions
from ckptavg.pipeline import every_output
from ckptavg.pipeline.basin import basin_note
from ckptavg.pipeline.expectation import cheapest_first, expect
from ckptavg.pipeline.preflight import check_format, check_space, check_strategy, dry_run_plan, naming
from ckptavg.pipeline.result import blank_result, build_result, decays_twice
from ckptavg.pipeline.session import Session, open_session
from ckptavg.pipeline.verdict import Verdict, scores_of
from ckptavg.pipeline.winner import REFERENCE, FinishedRun, choose, verdict_of
from ckptavg.pipeline.writing import WrittenOutput, write_output
from ckptavg.report import interval
from ckptavg.report.result import Comparison, Gain, StrategyResult
from ckptavg.runtime import signals
from ckptavg.runtime.progress import Watch
from ckptavg.score import Score, Split, valid
from ckptavg.strategies import from_spec, name_of, specs
from ckptavg.strategies.wsm import WSM

DEFAULT: Final = (
    REFERENCE, "best", "swa", "lawa", "ema", "wsm", "soup", "aswa", "sewa", "twa", "twa:on=train",
    "twa:solver=quadratic",
)  # fmt: skip
"""The strategies of a comparison without ``--strategies``, less those whose data or loss the task does not have."""


def compare(paths: Sequence[Path], options: Options, watch: Watch | None = None, **settings: Any) -> Comparison:
    """Run strategies on the checkpoints under ``paths`` and write the average of the winner on validation data.

    Each strategy runs as if alone: with the same random numbers and batches, and charged for every score it requests,
    cached or not. Those that plan the least work run first; Ctrl-C ends the running one and leaves out the rest, and an
    error of the task leaves out a strategy that ``strategies`` does not list. `last` takes part always.
    `ckptavg.pipeline.winner.choose` has the decision; ties go to the lower loss, then to the earlier strategy in the
    list. Test data are used only after it.

    Args:
        settings: those of `ComparisonOptions`; without ``strategies`` every strategy runs that the task allows.
    Raises:
        CkptavgError: on any expected failure; nothing is written then.
    """
    check_format(options)
    chosen = ComparisonOptions(**settings)
    with open_session(paths, options, watch) as this:
        evaluator = this.scored("compare scores every strategy, so it needs a task file, --val or --score-cmd")
        strategies = _parse_strategies(specs(chosen.strategies), evaluator)
        folder = None if chosen.write_all is None else Path(chosen.write_all)
        outputs = every_output.plan(folder, strategies, this)
        if options.dry_run:
            plan = [f"would compare {', '.join(strategies)}", *dry_run_plan(this.checkpoints, options)]
            plan += [f"would write {counted(len(outputs), 'average')} to {folder}/"] if outputs else []
            result = blank_result(this.found, strategies[REFERENCE], options, plan)
            return Comparison(**vars(result), winner="", strategies=())
        check_space(this.checkpoints, options, 1 + len(outputs))
        runs, unfinished = _run_all(
            this, evaluator, strategies, files=max(1, len(outputs)), listed=bool(specs(chosen.strategies))
        )
        singles = _singles(runs, evaluator)
        winner, selected_by, reason = choose(runs, singles, evaluator, chosen.select_by)
        valid(winner.score)
        evaluator.restart()
        for split in evaluator.splits:
            evaluator.prefetch([run.learned.coefficients for run in runs], split, exact=True)
        averages = {
            run.name: (run.learned.coefficients, run.strategy, outputs[run.name]) for run in runs
            if outputs and not run.score.invalid
        }  # fmt: skip
        with every_output.written(this, folder, averages) as files:
            written = write_output(this, winner.learned.coefficients, winner.strategy)
        results = _results(runs, files, evaluator, this.checkpoints)
        verdict = verdict_of(results, results[runs.index(winner)], selected_by, evaluator.scored_on, options)
        gains = _gains(results[runs.index(winner)], results)
        judgement = Verdict(winner.learned.coefficients, singles, verdict=verdict, gains=gains)
        learned = replace(winner.learned, notes=[f"{winner.name}: {note}" for note in winner.learned.notes])
        result = build_result(this, winner.strategy, learned, judgement, written)
        note = basin_note(
            evaluator, [run.strategy for run in runs], [run.learned.coefficients for run in runs], this
        )  # fmt: skip
        unwritten = [run for run in runs if outputs and run.score.invalid]
        warnings = [*result.warnings, *filter(None, unfinished.values()), *([note] if note else [])]
        warnings += [f"--write-all has no file of {run.name}: {run.score.invalid}" for run in unwritten]
        return Comparison(
            **vars(replace(result, cost=winner.cost, warnings=warnings)), winner=winner.name, strategies=results,
            selected_by=selected_by, reason=reason, unfinished=[*unfinished],
        )  # fmt: skip


def _parse_strategies(names: Sequence[str], evaluator: Evaluator) -> Mapping[str, Strategy]:
    """Return name → strategy, including `last`; all settings are checked before the first strategy runs."""
    n = evaluator.n
    if not names:
        names = [name for name in DEFAULT if _possible(from_spec(name), evaluator)]
        names = [name if _fits(from_spec(name), n) else f"{name}:k={n}" for name in names]
    elif REFERENCE not in names:
        names = [REFERENCE, *names]
    strategies = {name: from_spec(name) for name in names}
    for name, strategy in strategies.items():
        with naming(name, strategy):
            check_strategy(strategy, n, evaluator)
    return strategies


def _possible(strategy: Strategy, evaluator: Evaluator) -> bool:
    """Return whether the task has the loss, and the training data beside validation data, that a strategy needs."""
    has_loss, on_train = evaluator.losses is not None, getattr(strategy, "on", None) == "train"
    if on_train and not (has_loss and evaluator.has("train") and evaluator.scored_on != "train"):
        return False
    return has_loss or getattr(strategy, "solver", "") != "quadratic"


def _fits(strategy: Strategy, n: int) -> bool:
    """Return whether the default settings fit the number of candidates: K may be larger."""
    try:
        strategy.check(n, ("train", "val"), bounded=True)
    except UsageError:
        return False
    return True


def _run_all(
    this: Session, evaluator: Evaluator, strategies: Mapping[str, Strategy], files: int, *, listed: bool
) -> tuple[Sequence[FinishedRun], Mapping[str, str]]:
    """Run the strategies, the cheapest first; return their runs in the order of the list.

    Ctrl-C ends the running strategy if another one besides `last` has finished. An error of the task leaves out a
    strategy that was not ``listed``, unless that is `last` or nothing else finishes. Both end the run under torchrun:
    it ends all ranks itself, and the others wait in a collective operation for the rank that failed.

    Returns:
        The runs, and unfinished strategy → a sentence on it, empty if an earlier one names it.
    """
    evaluator.prepare()
    ordered = cheapest_first(strategies, evaluator)
    expect(this, evaluator, ordered, files)
    done, unfinished = dict[str, FinishedRun](), dict[str, str]()
    alone, first = this.run.workers.world_size == 1, None

    def run(name: str, strategy: Strategy) -> None:
        with this.run.progress.prefixed(name), naming(name, strategy):
            evaluator.restart(repr(strategy))
            learned = strategy.learn(evaluator)
            score = evaluator.exact_score(learned.coefficients, evaluator.scored_on)
        done[name] = FinishedRun(name=name, strategy=strategy, learned=learned, score=score, cost=evaluator.cost())
        this.run.progress.result(name, _figures(done[name], evaluator.scored_on))

    for name, strategy in ordered.items():
        this.run.progress("strategies", len(done) + len(unfinished), len(strategies))
        try:
            if len(done) < 2 or not alone:
                run(name, strategy)
            elif signals.stopped(partial(run, name, strategy)):
                this.run.progress("stopped; Ctrl-C again ends the run, and nothing is written", 0, 0)
                others = [other for other in ordered if other not in (*done, *unfinished, name)]
                rest = f"; {', '.join(others)} did not run" if others else ""
                unfinished |= {name: f"{name} was stopped by Ctrl-C{rest}"} | dict.fromkeys(others, "")
                break
        except TaskError as error:
            if listed or not alone or name == REFERENCE or signals.pending():
                error.hint = error.hint or (None if name == REFERENCE else f"choose --strategies without {name}")
                raise
            first = first or error
            unfinished[name] = f"{name} failed and was left out: {str(error).removeprefix(f'{name}: ')}"
            this.run.progress(unfinished[name], 0, 0)
    else:
        this.run.progress("strategies", len(strategies), len(strategies))
    if first and len(done) < 2:
        raise first
    return [done[name] for name in strategies if name in done], unfinished


def _figures(run: FinishedRun, split: Split) -> Mapping[str, float]:
    """Return the figures of a row that are known before the decision."""
    cost, held_out = run.cost, run.learned.held_out
    figures = {f"{split} {name}": value for name, value in [*run.score.figures.items()][:2]}
    figures |= {} if held_out is None else {"held-out loss": held_out}
    spent = {"scores": float(cost.evaluations)} if cost.passes is None else {"passes": cost.passes}
    return {**figures, **spent, "s": cost.seconds}


def _singles(runs: Sequence[FinishedRun], evaluator: Evaluator) -> Sequence[Score]:
    """Return the scores of all single candidates if a strategy has asked for them, as those of the search."""
    stages = [run.strategy.stages(evaluator.n, evaluator.losses, evaluator.scored_on) or () for run in runs]
    if not any(stage.singles for planned in stages for stage in planned):
        return ()
    return [evaluator.score(single) for single in Coefficients.singles(evaluator.n)]


def _results(
    runs: Sequence[FinishedRun],
    files: Mapping[str, WrittenOutput],
    evaluator: Evaluator,
    checkpoints: Sequence[Checkpoint],
) -> Sequence[StrategyResult]:
    """Return the rows, with the scores of the files where all were written."""
    scores = {
        run.name: files[run.name].scores if run.name in files else scores_of(run.learned.coefficients, evaluator)
        for run in runs
    }
    return [
        StrategyResult(
            name=run.name, strategy=name_of(run.strategy),
            settings=asdict(run.strategy),  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
            coefficients=[run.learned.coefficients.candidate(i) for i in range(evaluator.n)],
            groups=run.learned.coefficients.groups, used=len(run.learned.coefficients.selected),
            effective=run.learned.coefficients.effective,
            scores=scores[run.name],
            over_last={s: _gain(s, score, scores[REFERENCE][s]) for s, score in scores[run.name].items()},
            cost=run.cost, chose_on=_chose_on(run.strategy, evaluator.scored_on),
            notes=[*run.learned.notes, *(decays_twice(checkpoints) if isinstance(run.strategy, WSM) else ())],
            held_out=run.held_out, output=files[run.name].output if run.name in files else None,
        )
        for run in runs
    ]  # fmt: skip


def _gains(winner: StrategyResult, rows: Sequence[StrategyResult]) -> Mapping[str, Gain]:
    """Return strategy → gain of the winner over it on test data."""
    if "test" not in winner.scores:
        return {}
    return {row.name: interval.gain(winner.scores["test"], row.scores["test"]) for row in rows if row is not winner}


def _chose_on(strategy: Strategy, scored_on: Split) -> Split | None:
    """Return the data of the last choice, which are those that are scored, unless nothing is; None: no choice."""
    if isinstance(strategy, PlainAverage):
        return None
    unscored = getattr(strategy, "verify", None) == 1
    return (getattr(strategy, "on", None) if unscored else None) or scored_on


def _gain(split: Split, score: Score, reference: Score) -> Gain:
    """Return the difference, without an interval on data on which strategies chose: it would be no evidence."""
    if split == "test":
        return interval.gain(score, reference)
    others = {name: _gain(split, other, reference.others[name]) for name, other in score.others.items()}
    return Gain(value=score.value - reference.value, reason="the strategies chose on these data", others=others)
