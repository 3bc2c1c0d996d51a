"""Several strategies on the same candidates and the same evaluator: which is worth shipping?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from ckptavg.errors import UsageError
from ckptavg.finish import finish, name_of
from ckptavg.judge import Judgement
from ckptavg.mixture import Mixture, Watch
from ckptavg.objective import Cost, Learned, Score, Split, Strategy
from ckptavg.options import Options
from ckptavg.paired import gain
from ckptavg.pipeline import blank, plan, result
from ckptavg.result import Comparison, Contestant
from ckptavg.session import mixture as make_mixture
from ckptavg.session import opened
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
    if options.task is None:
        raise UsageError(
            "compare scores every strategy, so it needs a task file", hint="`ckptavg init` writes ./task.py"
        )
    with opened(paths, options) as found:
        mixture = make_mixture(found, options.task, options, watch)
        asked = _asked(names, mixture)
        if options.dry_run:
            would = f"would compare {', '.join(asked)}"
            shown = blank(found, asked[REFERENCE], options, [would, *plan(found.checkpoints, options)])
            return Comparison(contestants=(), winner="", result=shown)
        mixture.candidates  # noqa: B018  # loaded now, so that no strategy is charged for it
        runs: list[_Run] = []
        for name, strategy in asked.items():
            if watch is not None:
                watch("strategies", len(runs), len(asked), {})
            runs.append(_run(name, strategy, mixture, watch))
        winner = max(runs, key=lambda run: (run.score.value, -run.score.loss))
        mixture.restart()
        contestants = [_contestant(run, runs, mixture, options.seed) for run in runs]
        finished = finish(found.checkpoints, winner.learned.coefficients, winner.strategy, options, mixture, watch)
        judgement = Judgement(winner.learned.coefficients, verdict=_verdict(winner, contestants, mixture))
        report = result(found, winner.strategy, options, winner.learned, judgement, finished, mixture)
        return Comparison(contestants=contestants, winner=winner.name, result=replace(report, cost=winner.cost))


def _asked(names: Sequence[str], mixture: Mixture) -> Mapping[str, Strategy]:
    """Name → strategy, `last` among them; checked before any of them runs for hours."""
    n = mixture.n
    if not names:
        names = [*DEFAULT, *(_TRAINED if mixture.batchnorm_from == "train" != mixture.scored_on else ())]
        names = [f"{name}:k={n}" if getattr(from_spec(name), "k", 0) > n else name for name in names]
    elif REFERENCE not in names:
        names = [REFERENCE, *names]
    strategies = {name: from_spec(name) for name in names}
    for name, strategy in strategies.items():
        if (k := getattr(strategy, "k", 0)) > n:
            raise UsageError(f"{name}: k = {k} asks for more checkpoints than the {n} candidates there are")
    return strategies


def _run(name: str, strategy: Strategy, mixture: Mixture, watch: Watch | None) -> _Run:
    mixture.restart()
    mixture.watch = None if watch is None else partial(_told, watch, name)
    learned = strategy.learn(mixture)
    score = mixture.exact_score(learned.coefficients, mixture.scored_on)
    cost = mixture.cost()
    mixture.watch = watch
    return _Run(name, strategy, learned, score, cost)


def _told(watch: Watch, name: str, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    watch(f"{name}: {stage}", done, total, figures)


def _contestant(run: _Run, runs: Sequence[_Run], mixture: Mixture, seed: int) -> Contestant:
    coefficients = run.learned.coefficients
    reference = next(other for other in runs if other.name == REFERENCE).learned.coefficients
    scores: dict[Split, Score] = {split: mixture.exact_score(coefficients, split) for split in mixture.splits}
    return Contestant(
        name=run.name,
        strategy=name_of(run.strategy),
        settings=asdict(run.strategy),  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
        coefficients=[coefficients.candidate(i) for i in range(mixture.n)],
        groups=coefficients.groups,
        used=len(coefficients.selected),
        scores=scores,
        gains={split: gain(score, mixture.exact_score(reference, split), seed=seed) for split, score in scores.items()},
        cost=run.cost,
        notes=run.learned.notes,
    )


def _verdict(winner: _Run, contestants: Sequence[Contestant], mixture: Mixture) -> str:
    split: Split = mixture.splits[-1]
    won = next(one for one in contestants if one.name == winner.name)
    if won.name == REFERENCE:
        return "Nothing scores above the last candidate on validation data, so that one was written."
    found = won.gains[split]
    interval = f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}] over last on {split} data"
    if found.separated:
        return f"{won.name} wins on {mixture.scored_on} data: {interval}."
    return f"{won.name} wins on {mixture.scored_on} data, but not surely: {interval} does not exclude zero."
