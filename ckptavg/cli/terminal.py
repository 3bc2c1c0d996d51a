"""Everything that is shown to a person goes to stderr from here; stdout is for data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType

from ckptavg.errors import InterruptedRunError, OutputError, printable
from ckptavg.filesystem import atomic
from ckptavg.runtime import signals

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ckptavg.report.result import Landscape, Result

WIDE = 200  # columns where there is no terminal: a log should not cut names
_STDOUT, _STDERR = 1, 2
Watch = Callable[[str, int, int, Mapping[str, float]], None]


def console(*, stderr: bool = False) -> Console:
    """Rich's console for one of the two streams."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else WIDE)


@contextmanager
def stdout_for_data() -> Generator[None]:
    """Whatever writes to stdout within, a task or a process that it starts, writes to stderr."""
    sys.stdout.flush()
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for stream in (sys.stdout, sys.__stdout__):  # what was written to it by its own name goes to stderr too
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.flush()
        os.dup2(kept, _STDOUT)
        os.close(kept)


class Screen:
    """stderr, as loud as the user wants it."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._console = console(stderr=True)

    def print(self, what: RenderableType) -> None:
        """Show something, unless quiet."""
        if not self._quiet:
            self._console.print(what)

    def warn(self, result: Result | Landscape) -> None:
        """Say what was left out and what is doubtful; with -v also what was left out as a matter of course."""
        for one in result.left_out:
            if one.kind != "info" or self._verbose:
                self._say(f"left out {one.line}")
        for warning in result.warnings:
            self._say(warning)

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(printable(text), style="yellow", markup=False)

    def _remark(self, text: str) -> None:
        self._console.print(printable(text), style="dim", markup=False, soft_wrap=True)

    @contextmanager
    def watching(self) -> Generator[Watch | None]:
        """Remarks, and on a terminal a progress bar for the stages of a run; a signal is an InterruptedRunError."""
        try:
            with signals.waiting(), self._bars() as watch:
                yield watch
        except (Exception, KeyboardInterrupt, signals.Interruption) as error:
            if isinstance(error, Exception) and not signals.pending():
                raise
            # also where a worker process got the signal too, and what was noticed first is its death
            raise InterruptedRunError(
                "interrupted; nothing was written", hint="run the same command to resume"
            ) from error

    @contextmanager
    def _bars(self) -> Generator[Watch | None]:
        if self._quiet:
            yield None
            return
        if not sys.stderr.isatty():  # nor where FORCE_COLOR says that it is a terminal
            yield lambda stage, done, total, figures: None if total else self._remark(stage)
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(compact=True),
        )  # fmt: skip
        with Progress(*columns, console=self._console, transient=True) as progress:
            stages: dict[str, TaskID] = {}

            def watch(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
                if not total:
                    self._remark(stage)
                    return
                if stage not in stages:
                    for old in [task for task in progress.tasks if task.finished]:  # one line for what goes on
                        progress.remove_task(stages.pop(old.description))
                    stages[stage] = progress.add_task(stage, total=total, figures="")
                shown = "  ".join(f"{name} {_figure(name, value)}" for name, value in figures.items())
                progress.update(stages[stage], completed=done, total=total, figures=shown)

            yield watch


def _figure(name: str, value: float) -> str:
    return f"{value:.0%}" if name == "sure" else f"{value:g}" if name == "epoch" else f"{value:.4f}"


def check_text(path: Path) -> None:
    """Refuse a small file that `write_text` could not write, before hours of work for it.

    Raises:
        OutputError: as `ckptavg.output.destination.preflight` does.
    """
    from ckptavg.output.destination import preflight

    with suppress(OSError):
        if path.exists() and not path.is_dir() and not path.is_file():
            return  # a pipe or a device
    preflight(path, force=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all; a pipe or a device gets it as it is.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        target = path.resolve()
    except OSError as error:  # the working directory was removed
        raise OutputError(f"cannot be written: {atomic.os_message(error)}", path=path) from error
    if target.is_file() or not target.exists():
        atomic.write_text(target, text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", path=path) from error
