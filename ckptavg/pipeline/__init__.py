"""The program from top to bottom, one stage a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from ckptavg.checkpoints.discover import Found, with_news
from ckptavg.errors import UsageError
from ckptavg.objective import Objective, Strategy
from ckptavg.options import Options
from ckptavg.pipeline.preflight import check, check_space, plan
from ckptavg.pipeline.result import blank, result
from ckptavg.pipeline.session import journaled, opened
from ckptavg.pipeline.verdict import Judgement, judge
from ckptavg.pipeline.writing import finish, name_of
from ckptavg.report.result import Result
from ckptavg.runtime.progress import Watch
from ckptavg.strategies.best import Best


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
