"""Stages of a run from its strategies to the score of the output, for an estimate of its time, and their order."""

import math
from collections.abc import Mapping, Sequence

from ckptavg.objective import SCORED_ALONE, Stage, Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.pipeline.session import Session


def cheapest_first(strategies: Mapping[str, Strategy], evaluator: Evaluator) -> Mapping[str, Strategy]:
    """Sort strategies by the batches they plan, each as if alone; plain averages come first, unknown lengths last."""
    n, losses, split = evaluator.n, evaluator.losses, evaluator.scored_on
    planned = {name: strategy.stages(n, losses, split) for name, strategy in strategies.items()}
    batches = evaluator.score_batches(split) or 1

    def units(name: str) -> float:
        stages = planned[name]
        if stages is None:
            return math.inf
        return sum(stage.units + batches * (stage.scores + n * stage.singles) for stage in stages)

    return {name: strategies[name] for name in sorted(strategies, key=units)}


def expect(
    this: Session, evaluator: Evaluator, strategies: Mapping[str, Strategy], files: int = 1,
    more: Sequence[Stage] = (),
) -> None:  # fmt: skip
    """Plan a run of one strategy, named "", or a comparison of several, ``more``, and the scores of the ``files``.

    Nothing is read or scored for it, except that a loader without a length is counted where the strategy counts it.
    """
    options, compared = this.options, "" not in strategies
    has_test, planned = "test" in evaluator.splits, list[Stage]()
    for name, strategy in strategies.items():
        stages = strategy.stages(evaluator.n, evaluator.losses, evaluator.scored_on)
        if stages is None:
            this.run.progress.expect(None)
            return
        planned += [stage._replace(name=f"{name}: {stage.name}" if compared else stage.name) for stage in stages]
    baselines = options.baselines and not compared
    if (baselines or options.never_worse) and SCORED_ALONE not in planned:
        planned.append(SCORED_ALONE)
    rivals = len(strategies) if compared else 3 * baselines  # scores of the selection and of plain averages
    tests = (rivals + 2 * baselines + files) * has_test  # and of the best and the last candidate, and of the files
    planned += more
    planned.append(Stage("scoring the output", scores=rivals + files, tests=tests))
    first = next((i for i, stage in enumerate(planned) if stage.singles), None)
    planned = [stage._replace(scores=stage.scores + evaluator.n * (i == first)) for i, stage in enumerate(planned)]

    def resolved() -> Sequence[Stage] | None:
        score = evaluator.score_batches(evaluator.scored_on)
        test = evaluator.score_batches("test") if has_test else 0
        if score is None or test is None:
            return None
        return [s._replace(forward=s.forward + s.scores * score + s.tests * test) for s in planned]

    this.run.progress.expect(resolved, "forward" if evaluator.losses else "scores")
