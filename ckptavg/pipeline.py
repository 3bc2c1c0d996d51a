"""The program from top to bottom, one stage a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, cast

from ckptavg.average import output_specs
from ckptavg.candidates import budget
from ckptavg.candidates.plan import Plan
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.discover import Found, with_news
from ckptavg.errors import UsageError
from ckptavg.evaluator import Evaluator, Watch
from ckptavg.finish import Finished, finish, name_of
from ckptavg.judge import Judgement, judge
from ckptavg.objective import Learned, Objective, Score, Split, Strategy
from ckptavg.options import BITS, Options
from ckptavg.result import CandidateResult, Result
from ckptavg.session import check_space, journaled, opened, pick_device
from ckptavg.strategies.best import Best

_LOST: Final = 0.5  # of the candidates' differences: coefficients found with less than half of them may be any


def run(paths: Sequence[Path], strategy: Strategy, options: Options, watch: Watch | None = None) -> Result:
    """Learn coefficients for the checkpoints under ``paths`` and write their average.

    Raises:
        CkptavgError: in one line, with the exit code of its class; nothing is written then.
    """
    settings = {"name": name_of(strategy), **asdict(strategy)}  # pyright: ignore[reportArgumentType]  # a dataclass
    with opened(paths, options, watch) as found, journaled(found, options, settings, watch) as (evaluator, done):
        objective = evaluator or _count(found, strategy)
        check(strategy, len(found.checkpoints), evaluator)
        if options.dry_run:
            return blank(found, strategy, options, plan(found.checkpoints, options))
        check_space(found, options)
        learned = strategy.learn(objective)
        judgement = judge(evaluator, learned.coefficients, options) if evaluator else Judgement(learned.coefficients)
        wrote = Best() if judgement.replaced else strategy
        finished = finish(found.checkpoints, judgement.coefficients, wrote, options, evaluator, watch)
        done()
        found = with_news(found, paths, finished.output.path)
        return result(found, strategy, options, learned, judgement, finished, evaluator)


class _Count:
    """An objective for strategies that only want to know how many candidates there are."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a strategy that needs no task asked for {name}")


def _count(found: Found, strategy: Strategy) -> Objective:
    if strategy.needs_task:
        raise UsageError(
            f"{name_of(strategy)} learns from data, so it needs a task file, --val or --score-cmd",
            hint="`ckptavg init` writes ./task.py",
        )
    return cast("Objective", _Count(len(found.checkpoints)))


def blank(found: Found, strategy: Strategy, options: Options, warnings: Sequence[str] = ()) -> Result:
    """What is known of a run before it begins."""
    return Result(
        strategy=name_of(strategy),
        settings=asdict(strategy),  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
        seed=options.seed,
        candidates=[CandidateResult(path=c.path, step=c.step, coefficient=0.0) for c in found.checkpoints],
        left_out=found.left_out,
        warnings=[*found.warnings, *warnings, *_notes(found.checkpoints)],
    )


def result(
    found: Found,
    strategy: Strategy,
    options: Options,
    learned: Learned,
    judgement: Judgement,
    finished: Finished,
    evaluator: Evaluator | None,
) -> Result:
    """Everything there is to report of a finished run."""
    coefficients = judgement.coefficients
    invalid = [f"{score.invalid}: it counts as worse than any other" for score in judgement.singles if score.invalid]
    said = evaluator.notes if evaluator else ()
    doubts = [*invalid, *learned.notes, *said, *_doubts(found.checkpoints[0], coefficients, evaluator, finished)]
    known = blank(found, strategy, options, doubts)
    known = replace(
        known,
        candidates=[
            replace(
                candidate,
                coefficient=coefficients.candidate(i),
                score=judgement.singles[i] if judgement.singles else None,
                columns={name: values[i] for name, values in learned.columns.items()},
            )
            for i, candidate in enumerate(known.candidates)
        ],
        groups=coefficients.groups,
        trace=learned.trace,
        tables=learned.tables,
        output=finished.output,
    )
    if evaluator is None:
        return known
    return replace(
        known,
        scores=finished.scores,
        baselines=judgement.baselines,
        best_step=judgement.best_step,
        scored_on=evaluator.scored_on,
        holdout=options.holdout,
        verdict=judgement.verdict,
        replaced=judgement.replaced,
        worse=judgement.worse,
        cost=evaluator.cost(),
        matrix=evaluator.matrix,
    )


def check(strategy: Strategy, n: int, evaluator: Evaluator | None, name: str = "") -> None:
    """Refuse settings that the candidates or the task cannot meet, before anything runs for hours.

    Args:
        strategy: with its settings.
        n: the number of candidates.
        evaluator: what scores mixtures, if anything does.
        name: of the strategy, at the beginning of an error.
    """
    before = f"{name}: " if name else ""
    k: Any = getattr(strategy, "k", 0)
    if k != "auto" and k > n:
        raise UsageError(
            f"{before}--k {k} asks for more checkpoints than the {n} candidates there are",
            hint=f"choose --k {n} or less, or widen the window (--last, --start, --stop, --every)",
        )
    on: Split | None = getattr(strategy, "on", None)
    if evaluator is not None and on is not None and evaluator.differentiable and not evaluator.has(on):
        raise UsageError(f"{before}--on {on} needs {on} data, and the task has none", hint=f"add a {on}_dataloader()")
    if evaluator is not None and getattr(strategy, "early_reject", False) and not evaluator.bounded:
        raise UsageError(
            f"{before}a score can only be stopped early where the metric is bounded",
            hint="say how in the task file, for an accuracy: metric_bounds = (0.0, 1.0)",
        )


def plan(checkpoints: Sequence[Checkpoint], options: Options) -> list[str]:
    """What a dry run says it would do."""
    first = checkpoints[0]
    path, _ = options.destination
    written = sum(spec.nbytes for spec in output_specs(first, options.dtype).values())
    n, elements, device = len(checkpoints), first.numel, pick_device(options.device)
    bits = options.bits
    if bits == "auto":
        bits = budget.largest(elements, 4 * elements, n, options.group_size, device, BITS)
    memory = Plan(
        n=n, elements=elements, size=4 * elements, gradient=4 * elements,
        bits=bits, group_size=options.group_size, offload=options.offload, device=device,
    )  # fmt: skip
    return [
        f"would read {n} candidates of {first.size:,} bytes and write {written:,} bytes to {path}",
        f"learning would take for a float32 model: {memory}",
    ]


def _doubts(
    first: Checkpoint, coefficients: Coefficients, evaluator: Evaluator | None, finished: Finished
) -> list[str]:
    said = [f"copied {', '.join(finished.copied)} beside it"] if finished.copied else []
    said += finished.notes
    if evaluator is not None and not finished.scores:
        return [*said, "its rank is not the candidates', so it was not scored: `ckptavg eval` with its own config does"]
    if evaluator is not None and evaluator.matrix is not None:
        return said + _rounding_doubts(evaluator, coefficients, finished.scores[evaluator.scored_on])
    if len(coefficients.selected) > 1 and any(name.endswith("running_var") for name in first.names):
        said.append(
            "BatchNorm statistics were averaged, which is wrong for a mixture; with a task file they are recomputed"
        )
    return said


def _rounding_doubts(evaluator: Evaluator, coefficients: Coefficients, exact: Score) -> list[str]:
    """Say so where the search saw another score than the exact average's, by more than noise, or too little."""
    matrix = evaluator.matrix
    if matrix is None or (matrix.group_size is None and matrix.precision == "float32"):
        return []
    seen, lost = evaluator.score(coefficients), matrix.error
    gaps = {"score": (seen.value - exact.value, exact.noise)}
    if seen.loss is not None and exact.loss is not None:
        gaps["loss"] = (seen.loss - exact.loss, exact.loss_noise)
    wide = [f"its {name} {gap:+.4f} off (noise {noise:.4f})" for name, (gap, noise) in gaps.items() if abs(gap) > noise]
    if not wide and lost <= _LOST:
        return []
    what = f"the search did not see the average as it is ({', '.join(wide)})" if wide else "the search saw little"
    if matrix.group_size is None:
        return [f"at --precision {matrix.precision} {what}. Search with --precision float32"]
    return [
        f"at --bits {matrix.bits} {what}: {lost:.0%} of the candidates' differences was lost to rounding. "
        "Search with more bits"
    ]


def _notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What there is to say of how checkpoints were read, each sentence once, with the first that it is true of."""
    first: dict[str, Path] = {}
    count: dict[str, int] = {}
    for checkpoint in checkpoints:
        for note in checkpoint.notes:
            first.setdefault(note, checkpoint.path)
            count[note] = count.get(note, 0) + 1
    return [f"{path}{f' and {count[n] - 1} more' if count[n] > 1 else ''}: {n}" for n, path in first.items()]
