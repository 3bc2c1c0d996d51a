"""Several strategies on the same candidates and the same evaluator: which is worth shipping?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from ckptavg.checkpoints.discover import with_directory_changes
from ckptavg.cost import Cost
from ckptavg.errors import UsageError
from ckptavg.objective import Learned, Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.options import Options
from ckptavg.pipeline.preflight import check_space, check_strategy, dry_run_plan
from ckptavg.pipeline.result import blank_result, build_result
from ckptavg.pipeline.session import journaled, opened
from ckptavg.pipeline.verdict import Verdict
from ckptavg.pipeline.writing import name_of, write_output
from ckptavg.report.bootstrap import gain
from ckptavg.report.result import Comparison, StrategyResult
from ckptavg.runtime.progress import Watch
from ckptavg.score import Score, Split, valid
from ckptavg.strategies import from_spec

REFERENCE: Final = "last"
DEFAULT: Final = (REFERENCE, "best", "swa", "lawa", "ema", "soup", "aswa", "sewa", "twa")
_TRAINED: Final = ("twa:on=train",)  # where the task has training data beside validation data


@dataclass(frozen=True)
class _Run:
    """A strategy that has run: what it found, how good that is on validation data, what it cost."""

    name: str
    strategy: Strategy
    learned: Learned
    score: Score
    cost: Cost


def compare(paths: Sequence[Path], names: Sequence[str], options: Options, watch: Watch | None = None) -> Comparison:
    """Run strategies on the checkpoints under ``paths`` and write the average of the one that validates best.

    Each begins as if it ran alone: with the same random numbers, the same batches, and charged for every score it asks
    for. `last` always takes part, so the winner is never worse on validation data than no averaging. Equal scores go
    to the lower loss, then to the earlier in the list. Test data are looked at when all is decided.

    Args:
        paths: directories of checkpoints, or checkpoints.
        names: strategies with settings, as `ckptavg.strategies.from_spec` reads them; empty for all the task allows.
        options: what is common to all.
        watch: is told the progress.
    Raises:
        CkptavgError: in one line, with the exit code of its class; nothing is written then.
    """
    if not options.ways:
        raise UsageError(
            "compare scores every strategy, so it needs a task file, --val or --score-cmd",
            hint="`ckptavg init` writes ./task.py",
        )
    settings = {"name": "compare", "strategies": list(names)}
    with opened(paths, options, watch) as found, journaled(found, options, settings, watch) as (evaluator, done):
        assert evaluator is not None  # there is a way to score
        asked = _parse_strategies(names, evaluator)
        if options.dry_run:
            would = f"would compare {', '.join(asked)}"
            shown = blank_result(found, asked[REFERENCE], options, [would, *dry_run_plan(found.checkpoints, options)])
            return Comparison(contestants=(), winner="", result=shown)
        check_space(found, options)
        evaluator.prepare()
        runs: list[_Run] = []
        for name, strategy in asked.items():
            if watch is not None:
                watch("strategies", len(runs), len(asked), {})
            runs.append(_run(name, strategy, evaluator, watch))
        winner = max(runs, key=lambda run: (run.score.value, -(run.score.loss or 0.0)))
        valid(winner.score)
        evaluator.restart()
        for split in evaluator.splits:
            evaluator.prefetch([run.learned.coefficients for run in runs], split, exact=True)
        contestants = [_strategy_result(run, runs, evaluator, options.seed) for run in runs]
        finished = write_output(
            found.checkpoints, winner.learned.coefficients, winner.strategy, options, evaluator, watch
        )
        done()
        found = with_directory_changes(found, paths, finished.output.path)
        judgement = Verdict(winner.learned.coefficients, verdict=_verdict(winner, contestants, evaluator))
        report = build_result(found, winner.strategy, options, winner.learned, judgement, finished, evaluator)
        return Comparison(contestants=contestants, winner=winner.name, result=replace(report, cost=winner.cost))


def _parse_strategies(names: Sequence[str], evaluator: Evaluator) -> Mapping[str, Strategy]:
    """Name → strategy, `last` among them; checked before any of them runs for hours."""
    n = evaluator.n
    if not names:
        trained = evaluator.differentiable and evaluator.has("train") and evaluator.scored_on != "train"
        names = [*DEFAULT, *(_TRAINED if trained else ())]
        names = [f"{name}:k={n}" if _too_many(from_spec(name), n) else name for name in names]
    elif REFERENCE not in names:
        names = [REFERENCE, *names]
    strategies = {name: from_spec(name) for name in names}
    for name, strategy in strategies.items():
        check_strategy(strategy, n, evaluator, name)
    return strategies


def _too_many(strategy: Strategy, n: int) -> bool:
    k: Any = getattr(strategy, "k", 0)
    return k != "auto" and k > n


def _run(name: str, strategy: Strategy, evaluator: Evaluator, watch: Watch | None) -> _Run:
    evaluator.restart()
    evaluator.watch = None if watch is None else partial(_prefixed_progress, watch, name)
    learned = strategy.learn(evaluator)
    score = evaluator.exact_score(learned.coefficients, evaluator.scored_on)
    cost = evaluator.cost()
    evaluator.watch = watch
    return _Run(name, strategy, learned, score, cost)


def _prefixed_progress(
    watch: Watch, name: str, stage: str, done: int, total: int, figures: Mapping[str, float]
) -> None:
    watch(f"{name}: {stage}", done, total, figures)


def _strategy_result(run: _Run, runs: Sequence[_Run], evaluator: Evaluator, seed: int) -> StrategyResult:
    coefficients = run.learned.coefficients
    reference = next(other for other in runs if other.name == REFERENCE).learned.coefficients
    scores: dict[Split, Score] = {split: evaluator.exact_score(coefficients, split) for split in evaluator.splits}
    return StrategyResult(
        name=run.name,
        strategy=name_of(run.strategy),
        settings=asdict(run.strategy),  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
        coefficients=[coefficients.candidate(i) for i in range(evaluator.n)],
        groups=coefficients.groups,
        used=len(coefficients.selected),
        scores=scores,
        gains={
            split: gain(score, evaluator.exact_score(reference, split), seed=seed) for split, score in scores.items()
        },
        cost=run.cost,
        notes=run.learned.notes,
    )


def _verdict(winner: _Run, contestants: Sequence[StrategyResult], evaluator: Evaluator) -> str:
    split: Split = evaluator.splits[-1]
    won = next(one for one in contestants if one.name == winner.name)
    if won.name == REFERENCE:
        return "Nothing scores above the last candidate on validation data, so that one was written."
    found = won.gains[split]
    if found.low is None:
        return f"{won.name} wins on {evaluator.scored_on} data: {found.value:+.4f} over last on {split} data."
    interval = f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}] over last on {split} data"
    if found.separated and found.value < 0:
        return f"{won.name} wins on {evaluator.scored_on} data, but is WORSE on {split} data: {interval}."
    if found.separated:
        return f"{won.name} wins on {evaluator.scored_on} data: {interval}."
    return f"{won.name} wins on {evaluator.scored_on} data, but not surely: {interval} does not exclude zero."
