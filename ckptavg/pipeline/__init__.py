"""Main pipeline: one line per stage of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from ckptavg.checkpoints.discover import Discovered, with_directory_changes
from ckptavg.errors import UsageError
from ckptavg.objective import Objective, Strategy
from ckptavg.options import Options
from ckptavg.pipeline.preflight import check_space, check_strategy, dry_run_plan
from ckptavg.pipeline.result import blank_result, build_result
from ckptavg.pipeline.session import journaled, opened
from ckptavg.pipeline.verdict import Verdict, judge
from ckptavg.pipeline.writing import name_of, write_output
from ckptavg.report.result import Result
from ckptavg.runtime.progress import Watch
from ckptavg.strategies.best import Best


def run(paths: Sequence[Path], strategy: Strategy, options: Options, watch: Watch | None = None) -> Result:
    """Learn coefficients for the checkpoints under ``paths`` and write their average.

    Raises:
        CkptavgError: on any expected failure; nothing is written then.
    """
    settings = {"name": name_of(strategy), **asdict(strategy)}  # pyright: ignore[reportArgumentType]  # a dataclass
    with opened(paths, options, watch) as found, journaled(found, options, settings, watch) as (evaluator, done):
        objective = evaluator or _count_only(found, strategy)
        check_strategy(strategy, len(found.checkpoints), evaluator)
        if options.dry_run:
            return blank_result(found, strategy, options, dry_run_plan(found.checkpoints, options))
        check_space(found, options)
        learned = strategy.learn(objective)
        judgement = judge(evaluator, learned.coefficients, options) if evaluator else Verdict(learned.coefficients)
        source = Best() if judgement.replaced else strategy
        finished = write_output(found.checkpoints, judgement.coefficients, source, options, evaluator, watch)
        done()
        found = with_directory_changes(found, paths, finished.output.path)
        return build_result(found, strategy, options, learned, judgement, finished, evaluator)


class _CountOnly:
    """Objective for strategies that use only the number of candidates."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a strategy with needs_task = False used objective.{name}")


def _count_only(found: Discovered, strategy: Strategy) -> Objective:
    if strategy.needs_task:
        raise UsageError(
            f"{name_of(strategy)} learns from data, so it needs a task file, --val or --score-cmd",
            hint="`ckptavg init` writes ./task.py",
        )
    return cast("Objective", _CountOnly(len(found.checkpoints)))
