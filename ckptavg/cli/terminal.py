"""Print messages and progress to stderr; stdout is reserved for data."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.text import Text

from ckptavg.cli.stage_log import StageLog
from ckptavg.errors import InterruptedRunError, decimal, printable
from ckptavg.report.layout import Sentence
from ckptavg.runtime import signals
from ckptavg.runtime.estimate import LEFT, time_left
from ckptavg.runtime.progress import RESULT

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ckptavg.report.result import Landscape, Result
    from ckptavg.runtime.progress import Watch

WIDE = 200  # columns without a terminal, so that names in a log are not cut
_STDOUT, _STDERR = 1, 2


def console(*, stderr: bool = False) -> Console:
    """Return a Rich console for stdout or stderr."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else WIDE)


def show_message(screen: Console, text: str, style: str) -> None:
    """Print a message that may name files: between words on a terminal, else on one line; no name is cut or divided."""
    if screen.is_terminal:
        screen.print(Sentence(text, style, whole=True), soft_wrap=True)
    else:
        screen.print(Text(text, style=style), soft_wrap=True)


@contextmanager
def stdout_for_data() -> Generator[None]:
    """Redirect stdout to stderr inside the block, for task code and the processes it starts too."""
    sys.stdout.flush()
    saved = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for stream in (sys.stdout, sys.__stdout__):  # flush writes to sys.__stdout__ to stderr as well
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.flush()
        os.dup2(saved, _STDOUT)
        os.close(saved)


class Screen:
    """Messages on stderr, filtered by ``--quiet`` and ``--verbose``."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._console = console(stderr=True)

    def print(self, renderable: RenderableType) -> None:
        """Print unless quiet."""
        if not self._quiet:
            self._console.print(renderable)

    def warn(self, result: Result | Landscape) -> None:
        """Print the warnings and the files left out; routine exclusions only with ``-v``."""
        left_out = (f"left out {file.line}" for file in result.left_out if file.kind != "info" or self._verbose)
        for warning in (*left_out, *result.warnings):
            if not self._quiet:
                show_message(self._console, printable(warning), "yellow")

    def show_next_steps(self, steps: Mapping[str, str]) -> None:
        """Print code and commands to copy, without line breaks, unless quiet."""
        for name, step in steps.items() if not self._quiet else ():
            self._console.print(Text(printable(f"{f'to {name}:':<10} {step}"), style="dim"), soft_wrap=True)

    def _remark(self, text: str) -> None:
        show_message(self._console, printable(text), "dim")

    @contextmanager
    def watching(self) -> Generator[Watch | None]:
        """Yield the progress callback, with bars on a terminal; raise InterruptedRunError on a signal."""
        try:
            with signals.waiting(), self._bars() as watch:
                yield watch
        except InterruptedRunError:
            raise
        except (Exception, KeyboardInterrupt, signals.Interruption) as error:
            if isinstance(error, Exception) and not signals.pending():
                raise
            # also if a worker process received the signal and its death was noticed first
            hint = next(iter(getattr(error, "__notes__", ())), "run the same command to resume")
            raise InterruptedRunError("interrupted; nothing was written", hint=hint) from error

    @contextmanager
    def _bars(self) -> Generator[Watch | None]:
        if self._quiet:
            yield None
            return
        if not sys.stderr.isatty() or self._console.is_dumb_terminal:  # not even with FORCE_COLOR
            log = StageLog(self._remark)
            try:
                yield log
            finally:
                log.close()
            return
        from rich.constrain import Constrain
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn

        from ckptavg.report.comparison import running_table

        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"), TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        progress, finished = Progress(*columns, console=self._console), dict[str, Mapping[str, float]]()

        def shown() -> Constrain:
            table = [running_table(finished)] if finished else []
            return Constrain(Group(*table, progress), self._console.width - 2)  # an echoed ^C must not wrap the line

        with Live(get_renderable=shown, console=self._console, transient=True):
            stages: dict[str, TaskID] = {}

            def watch(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
                if not total:
                    self._remark(stage)
                    return
                if stage.endswith(RESULT):
                    finished[stage.removesuffix(RESULT)] = figures
                    return
                if stage not in stages:
                    for old in [task for task in progress.tasks if task.finished]:  # show only the running stage
                        progress.remove_task(stages.pop(old.description))
                    stages[stage] = progress.add_task(stage, total=total, figures="", left="")
                shown = "  ".join(
                    f"{name} {_figure(name, value)}" for name, value in figures.items() if name not in LEFT
                )
                left = time_left(figures) if figures.keys() & LEFT else ""
                progress.update(stages[stage], completed=done, total=total, figures=shown, left=left)

            yield watch


def _figure(name: str, value: float) -> str:
    return f"{value:.0%}" if name == "sure" else f"{value:g}" if name == "epoch" else decimal(value)
