"""Build the `Result` of a run from what its stages returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import Discovered
from ckptavg.coefficients import Coefficients
from ckptavg.objective import Learned, Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.options import Options
from ckptavg.pipeline.verdict import Verdict
from ckptavg.pipeline.writing import WrittenOutput, name_of
from ckptavg.report.result import CandidateResult, Result
from ckptavg.score import Score

_LOST: Final = 0.5  # of the candidates' differences: coefficients found with less than half of them may be any


def blank_result(found: Discovered, strategy: Strategy, options: Options, warnings: Sequence[str] = ()) -> Result:
    """What is known of a run before it begins."""
    return Result(
        strategy=name_of(strategy),
        settings=asdict(strategy),  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
        seed=options.seed,
        candidates=[CandidateResult(path=c.path, step=c.step, coefficient=0.0) for c in found.checkpoints],
        left_out=found.left_out,
        warnings=[*found.warnings, *warnings, *_notes(found.checkpoints)],
    )


def build_result(
    found: Discovered,
    strategy: Strategy,
    options: Options,
    learned: Learned,
    judgement: Verdict,
    finished: WrittenOutput,
    evaluator: Evaluator | None,
) -> Result:
    """Everything there is to report of a finished run."""
    coefficients = judgement.coefficients
    invalid = [f"{score.invalid}: it counts as worse than any other" for score in judgement.singles if score.invalid]
    said = evaluator.notes if evaluator else ()
    doubts = [*invalid, *learned.notes, *said, *_warnings(found.checkpoints[0], coefficients, evaluator, finished)]
    known = blank_result(found, strategy, options, doubts)
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


def _warnings(
    first: Checkpoint, coefficients: Coefficients, evaluator: Evaluator | None, finished: WrittenOutput
) -> list[str]:
    said = [f"copied {', '.join(finished.copied)} beside it"] if finished.copied else []
    said += finished.notes
    if evaluator is not None and not finished.scores:
        return [*said, "its rank is not the candidates', so it was not scored: `ckptavg eval` with its own config does"]
    if evaluator is not None and evaluator.matrix is not None:
        return said + _rounding_warnings(evaluator, coefficients, finished.scores[evaluator.scored_on])
    if len(coefficients.selected) > 1 and any(name.endswith("running_var") for name in first.names):
        said.append(
            "BatchNorm statistics were averaged, which is wrong for a mixture; with a task file they are recomputed"
        )
    return said


def _rounding_warnings(evaluator: Evaluator, coefficients: Coefficients, exact: Score) -> list[str]:
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
