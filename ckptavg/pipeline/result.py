"""Build the `Result` of a run from what its stages returned."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import Discovered
from ckptavg.checkpoints.steps import rates_beside
from ckptavg.coefficients import Coefficients
from ckptavg.errors import decimal
from ckptavg.objective import Learned, Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.options import Options
from ckptavg.pipeline.model_card import with_card
from ckptavg.pipeline.next_steps import next_steps
from ckptavg.pipeline.session import Session
from ckptavg.pipeline.verdict import Verdict
from ckptavg.pipeline.writing import WrittenOutput
from ckptavg.report.result import CandidateResult, MatrixResult, Result
from ckptavg.score import Score
from ckptavg.strategies import name_of
from ckptavg.strategies.wsm import WSM

_CONSTANT: Final = 0.9  # part of a learning rate that is left at the end if it is called constant
_MAX_ERROR: Final = 0.5  # relative to the candidates' differences; above it the coefficients may be arbitrary


def blank_result(found: Discovered, strategy: Strategy, options: Options, warnings: Sequence[str] = ()) -> Result:
    """Build the part of the result that is known before the run: settings, candidates and warnings."""
    return Result(
        strategy=name_of(strategy),
        settings=asdict(strategy),  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
        seed=options.seed,
        candidates=[CandidateResult(path=c.path, step=c.step, coefficient=0.0) for c in found.checkpoints],
        left_out=found.left_out,
        warnings=[*found.warnings, *warnings, *_notes(found.checkpoints)],
    )


def build_result(
    this: Session, strategy: Strategy, learned: Learned, judgement: Verdict, finished: WrittenOutput
) -> Result:
    """Finish the run, and build its result."""
    found = this.finish(finished.output.path)
    coefficients, evaluator, options = judgement.coefficients, this.evaluator, this.options
    invalid = [f"{score.invalid}: ranked below every valid score" for score in judgement.singles if score.invalid]
    notes = evaluator.notes if evaluator else ()
    notes = [*notes, *(decays_twice(found.checkpoints) if isinstance(strategy, WSM) else ())]
    warnings = [*invalid, *learned.notes, *notes, *_warnings(found.checkpoints[0], coefficients, evaluator, finished)]
    blank = blank_result(found, strategy, options, list(dict.fromkeys(warnings)))
    candidates = [
        replace(
            candidate, coefficient=coefficients.candidate(i), score=judgement.singles[i] if judgement.singles else None,
            columns={name: values[i] for name, values in learned.columns.items()},
        )
        for i, candidate in enumerate(blank.candidates)
    ]  # fmt: skip
    result = replace(
        blank, candidates=candidates, groups=coefficients.groups,
        effective=coefficients.effective, trace=learned.trace, tables=learned.tables,
        output=finished.output, scores=finished.scores, baselines=judgement.baselines, best_step=judgement.best_step,
        verdict=judgement.verdict, gains=judgement.gains, replaced=judgement.replaced, worse=judgement.worse,
        held_out=None if judgement.replaced else learned.held_out,
        next_steps=next_steps(finished.output.path, found.checkpoints, options),
    )  # fmt: skip
    if evaluator is not None:
        cost, matrix = evaluator.cost(), evaluator.matrix
        result = replace(result, scored_on=evaluator.scored_on, holdout=options.holdout, cost=cost, matrix=matrix)
    return with_card(result, this, strategy)


def _warnings(
    first: Checkpoint, coefficients: Coefficients, evaluator: Evaluator | None, finished: WrittenOutput
) -> list[str]:
    warnings = [f"copied {', '.join(finished.copied)} to the output directory"] if finished.copied else []
    warnings += finished.notes
    if evaluator is not None and (matrix := evaluator.matrix) is not None:
        if matrix.group_size is not None or matrix.precision != "float32":
            exact = finished.scores[evaluator.scored_on]
            warnings += _rounding_warnings(matrix, evaluator.score(coefficients), exact)
    elif len(coefficients.selected) > 1 and any(
        name.endswith("running_var") and name not in first.kept for name in first.names
    ):
        wrong = "BatchNorm statistics were averaged, which is wrong for a mixture"
        warnings.append(f"{wrong}; with a task file they are recomputed")
    return warnings


def decays_twice(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return a note if the learning rate fell between the first candidate and the last, by the Trainer's log."""
    last, rates = checkpoints[-1], rates_beside(checkpoints[-1].folder)
    first = next(checkpoint for checkpoint in checkpoints if checkpoint.run == last.run)
    before, after = ([rate for step, rate in rates.items() if step <= c.step] for c in (first, last))
    if not before or after[-1] >= _CONSTANT * before[-1]:
        return []
    fall = f"from {before[-1]:.3g} at step {first.step} to {after[-1]:.3g} at step {last.step}"
    return [f"the learning rate fell {fall}, and wsm decays it a second time: compare it with swa"]


def _rounding_warnings(matrix: MatrixResult, searched: Score, exact: Score) -> list[str]:
    """Warn if the search's score is off from the exact average's by more than noise, or rounding lost too much."""
    gaps = {"score": (searched.value - exact.value, exact.noise)}
    if searched.loss is not None and exact.loss is not None:
        gaps["loss"] = (searched.loss - exact.loss, exact.loss_noise)
    wide = [
        f"{name} off by {decimal(gap, '+')}, noise {decimal(noise)}"
        for name, (gap, noise) in gaps.items()
        if abs(gap) > noise
    ]
    if not wide and matrix.error <= _MAX_ERROR:
        return []
    problem = f"the search misjudged the average ({'; '.join(wide)})" if wide else "the search was too coarse"
    if matrix.group_size is None:
        return [f"at --precision {matrix.precision} {problem}. Search with --precision float32"]
    lost = f"{matrix.error:.0%} of the candidates' differences was lost to rounding"
    return [f"at --bits {matrix.bits} {problem}: {lost}. Search with more bits"]


def _notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return each distinct note of the readers once, with the first checkpoint that has it and the number of others."""
    paths: dict[str, list[Path]] = {}
    for checkpoint in checkpoints:
        for note in checkpoint.notes:
            paths.setdefault(note, []).append(checkpoint.path)
    more = {note: f" and {len(same) - 1} more" if len(same) > 1 else "" for note, same in paths.items()}
    return [f"{same[0]}{more[note]}: {note}" for note, same in paths.items()]
