"""Main pipeline: one line per stage of a run."""

from collections.abc import Sequence
from pathlib import Path

from ckptavg.coefficients import Coefficients
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.options import Options
from ckptavg.pipeline.expectation import expect
from ckptavg.pipeline.preflight import check_format, check_space, check_strategy, dry_run_plan
from ckptavg.pipeline.result import blank_result, build_result
from ckptavg.pipeline.session import Rounds, open_session
from ckptavg.pipeline.verdict import Verdict, judge, with_test
from ckptavg.pipeline.writing import write_output
from ckptavg.report.result import Result
from ckptavg.runtime.progress import Watch
from ckptavg.strategies.best import Best


def run(
    strategy: Strategy, paths: Sequence[Path], options: Options, watch: Watch | None = None,
    rounds: Rounds | None = None,
) -> Result:  # fmt: skip
    """Learn coefficients for the checkpoints under ``paths`` and write their average; ``rounds`` as in `open_session`.

    Raises:
        CkptavgError: on any expected failure; nothing is written then.
    """
    check_format(options)
    with open_session(paths, options, watch, rounds=rounds) as this:
        evaluator, checkpoints = this.evaluator, this.checkpoints
        runs = [checkpoint.run for checkpoint in checkpoints]
        check_strategy(strategy, len(checkpoints), evaluator, runs)
        if options.dry_run:
            return blank_result(this.found, strategy, options, dry_run_plan(checkpoints, options))
        check_space(checkpoints, options)
        if evaluator:
            expect(this, evaluator, {"": strategy})
        if isinstance(strategy, PlainAverage):
            learned = strategy.average(runs)
        else:
            assert evaluator is not None  # see `check_strategy`
            evaluator.restart(repr(strategy))
            if options.baselines or options.never_worse:  # `judge` needs them whole: none is to be stopped early
                evaluator.prefetch(Coefficients.singles(len(checkpoints)), exact=True)
            learned = strategy.learn(evaluator)
        verdict = judge(this, evaluator, strategy, learned.coefficients) if evaluator else Verdict(learned.coefficients)
        written = write_output(this, verdict.coefficients, Best() if verdict.replaced else strategy)
        if evaluator:
            verdict = with_test(verdict, written.scores, evaluator.scored_on)
        return build_result(this, strategy, learned, verdict, written)
