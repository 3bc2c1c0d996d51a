"""The program from top to bottom, one stage a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, cast

from ckptavg.average import output_specs
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.discover import Found
from ckptavg.errors import UsageError
from ckptavg.finish import Finished, finish, name_of
from ckptavg.judge import Judgement, judge
from ckptavg.mixture import Mixture, Watch
from ckptavg.objective import Learned, Objective, Score, Strategy
from ckptavg.options import Options, destination
from ckptavg.result import CandidateResult, MatrixResult, Result
from ckptavg.session import mixture as make_mixture
from ckptavg.session import opened

_LOST: Final = 0.5  # of the candidates' differences: coefficients found with less than half of them may be any


def run(paths: Sequence[Path], strategy: Strategy, options: Options, watch: Watch | None = None) -> Result:
    """Learn coefficients for the checkpoints under ``paths`` and write their average.

    Raises:
        CkptavgError: in one line, with the exit code of its class; nothing is written then.
    """
    with opened(paths, options) as found:
        objective, mixture = _objective(found, strategy, options, watch)
        if options.dry_run:
            return blank(found, strategy, options, plan(found.checkpoints, options))
        learned = strategy.learn(objective)
        judgement = judge(mixture, learned.coefficients, options) if mixture else Judgement(learned.coefficients)
        finished = finish(found.checkpoints, judgement.coefficients, strategy, options, mixture, watch)
        return result(found, strategy, options, learned, judgement, finished, mixture)


class _Count:
    """An objective for strategies that only want to know how many candidates there are."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a strategy that needs no task asked for {name}")


def _objective(
    found: Found, strategy: Strategy, options: Options, watch: Watch | None
) -> tuple[Objective, Mixture | None]:
    if options.task is not None:
        mixture = make_mixture(found, options.task, options, watch)
        return mixture, mixture
    if strategy.needs_task:
        raise UsageError(
            f"{name_of(strategy)} learns from data, so it needs a task file", hint="`ckptavg init` writes ./task.py"
        )
    return cast("Objective", _Count(len(found.checkpoints))), None


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
    mixture: Mixture | None,
) -> Result:
    """Everything there is to report of a finished run."""
    coefficients = judgement.coefficients
    doubts = [*learned.notes, *_doubts(found.checkpoints[0], coefficients, mixture, finished)]
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
        output=finished.output,
    )
    if mixture is None:
        return known
    return replace(
        known,
        scores=finished.scores,
        baselines=judgement.baselines,
        best_step=judgement.best_step,
        scored_on=mixture.scored_on,
        holdout=options.holdout,
        verdict=judgement.verdict,
        worse=judgement.worse,
        cost=mixture.cost(),
        matrix=MatrixResult(
            bits=mixture.candidates.bits,
            group_size=None if mixture.candidates.exact else mixture.group_size,
            bytes=mixture.candidates.nbytes,
            error=mixture.candidates.error,
        ),
    )


def plan(checkpoints: Sequence[Checkpoint], options: Options) -> list[str]:
    """What a dry run says it would do."""
    first = checkpoints[0]
    path, _ = destination(options.output)
    written = sum(spec.nbytes for spec in output_specs(first, options.dtype).values())
    bits = 32 if options.bits == "auto" else options.bits
    scales = 0 if bits == 32 else 8 / options.group_size
    matrix = round(len(checkpoints) * first.numel * (bits / 8 + scales))
    return [
        f"would read {len(checkpoints)} candidates of {first.size:,} bytes and write {written:,} bytes to {path}",
        f"a float32 model's candidate matrix would take {matrix:,} bytes at {bits} bits on --device {options.device}",
    ]


def _doubts(first: Checkpoint, coefficients: Coefficients, mixture: Mixture | None, finished: Finished) -> list[str]:
    said = [f"copied {', '.join(finished.copied)} beside it"] if finished.copied else []
    if mixture is not None:
        return said + _rounding_doubts(mixture, coefficients, finished.scores[mixture.scored_on])
    if len(coefficients.selected) > 1 and any(name.endswith("running_var") for name in first.names):
        said.append("BatchNorm statistics were averaged, which is wrong for a mixture; with --task they are recomputed")
    return said


def _rounding_doubts(mixture: Mixture, coefficients: Coefficients, exact: Score) -> list[str]:
    """Say so where the search saw another score than the exact average's, by more than noise, or too little."""
    if mixture.candidates.exact:
        return []
    seen, lost = mixture.score(coefficients), mixture.candidates.error
    gaps = {"loss": (seen.loss - exact.loss, exact.loss_noise), "score": (seen.value - exact.value, exact.noise)}
    wide = [f"its {name} {gap:+.4f} off (noise {noise:.4f})" for name, (gap, noise) in gaps.items() if abs(gap) > noise]
    if not wide and lost <= _LOST:
        return []
    what = f"the search did not see the average as it is ({', '.join(wide)})" if wide else "the search saw little"
    return [
        f"at --bits {mixture.candidates.bits} {what}: {lost:.0%} of the candidates' differences was lost to rounding. "
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
