"""Loggers beside a run: the figures of its search while it runs, and those of its report at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ckptavg import loggers
from ckptavg.errors import CkptavgError, OutputError, printable
from ckptavg.loggers import Logger, clean
from ckptavg.options import Options
from ckptavg.report.result import Result
from ckptavg.runtime.command_line import CommandLine
from ckptavg.runtime.estimate import LEFT
from ckptavg.runtime.progress import RESULT, Watch

R = TypeVar("R", bound=object)


class Logs:
    """The open loggers of a run; one that fails is left out from then on, with a warning: it must not end the run.

    Attributes:
        watch: the progress callback of the run, which also logs; the given one if there are no loggers.
    """

    def __init__(self, open_loggers: Mapping[str, Logger], watch: Watch | None) -> None:
        self._loggers = dict(open_loggers)
        self._shown = watch
        self._warnings: list[str] = []
        self._last: dict[str, int] = {}  # stage → what was done at its last report
        self._before: dict[str, int] = {}  # stage → steps of its earlier passes
        self.watch: Watch | None = self._watch if self._loggers else watch

    def _watch(self, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        if self._shown:
            self._shown(stage, done, total, metrics)
        last = self._last.get(stage)
        if not total or done == last:
            return
        if last is not None and done < last:  # the stage runs again
            self._before[stage] = self._before.get(stage, 0) + last
        self._last[stage] = done
        step = self._before.get(stage, 0) + done
        place = f"strategies/{stage.removesuffix(RESULT)}" if stage.endswith(RESULT) else f"search/{stage}"
        figures = {clean(f"{place}/{name}"): value for name, value in metrics.items() if name not in LEFT}
        for name, value in figures.items():
            self._each(lambda logger, name=name, value=value: logger.scalar(name, value, step))

    def finished(self, report: R, line: CommandLine | None = None) -> R:
        """Log the report of the run, end the loggers, and return it with their failures among its warnings."""
        if self._loggers and isinstance(report, Result):
            from ckptavg.report import as_json, figures

            record = figures.record(as_json.to_dict(report, line))
            self._each(lambda logger: logger.finish(record))
        self.close(failed=False)
        if not self._warnings or not isinstance(report, Result):
            return report
        return replace(report, warnings=[*report.warnings, *self._warnings])

    def close(self, *, failed: bool) -> None:
        """End the loggers that are still open."""
        self._each(lambda logger: logger.close(failed=failed))
        self._loggers.clear()

    def _each(self, work: Callable[[Logger], None]) -> None:
        for text, logger in [*self._loggers.items()]:
            try:
                work(logger)
            except Exception as error:  # whatever a service raises, hours of work are not lost with it
                del self._loggers[text]
                warning = f"--log-to {text} failed, and has nothing from here on: {_message(error)}"
                self._warnings.append(warning)
                if self._shown:
                    self._shown(printable(warning), 0, 0, {})


@contextmanager
def opened(options: Options, watch: Watch | None) -> Generator[Logs]:
    """Open the loggers of ``--log-to`` on rank 0; a dry run has none.

    Raises:
        OutputError: if one of them cannot be started.
    """
    logs = Logs((not options.dry_run and options.workers.on_rank_zero(lambda: _start(options))) or {}, watch)
    try:
        yield logs
    finally:
        logs.close(failed=True)  # those that `finished` has not closed


def _start(options: Options) -> Mapping[str, Logger]:
    started: dict[str, Logger] = {}
    name = clean(Path(options.output).name.removesuffix(".safetensors")).strip(".") or "ckptavg"
    for text in options.log_to:
        try:
            started[text] = loggers.opened(text, name)
        except Exception as error:  # such as of a server that does not answer
            Logs(started, None).close(failed=True)
            if isinstance(error, CkptavgError):
                raise
            hint = "leave out --log-to, or make it reachable"
            raise OutputError(f"--log-to {text} cannot be started: {_message(error)}", hint=hint) from error
    return started


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
