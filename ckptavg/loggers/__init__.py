"""Loggers of ``--log-to``: one module a backend, chosen by the word before the colon."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, NamedTuple, Protocol

from ckptavg.errors import UsageError, nearest


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished run, for a logger.

    Attributes:
        settings: strategy, settings and seed by name.
        scalars: the figures of the report by name, such as ``scores/val/loss``.
        series: curves over the candidates: name → (training step, value).
        verdict: the report's sentence.
        markdown: the whole report.
        report: the whole report as JSON.
    """

    settings: Mapping[str, bool | float | str]
    scalars: Mapping[str, float]
    series: Mapping[str, Sequence[tuple[int, float]]]
    verdict: str
    markdown: str
    report: str


class Logger(Protocol):
    """An open run of a backend. Names have letters, digits and ``_ - . /`` only; errors are the backend's own."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """Log a figure of the search; must return without waiting for a network or a disk."""
        ...

    def finish(self, record: Record) -> None:
        """Log the report."""
        ...

    def close(self, *, failed: bool) -> None:
        """End the run, once everything is stored; ``failed`` if there is no report."""
        ...


class _Backend(NamedTuple):
    """A kind of logger: the package that must be importable, its name for pip, and what stands behind the colon."""

    package: str
    pip: str
    target: str


BACKENDS: Final = {
    "tensorboard": _Backend("tensorboard", "tensorboard", "DIR"),
    "wandb": _Backend("wandb", "wandb", "[PROJECT]"),
    "mlflow": _Backend("mlflow", "mlflow", "[EXPERIMENT]"),
}
_FORMS: Final = "tensorboard:DIR, wandb[:PROJECT] or mlflow[:EXPERIMENT]"


def check(texts: Sequence[str]) -> None:
    """Raise UsageError for a logger that does not exist, or whose package is not installed."""
    for text in texts:
        kind, _, target = text.partition(":")
        if kind not in BACKENDS:
            hint = nearest(kind, BACKENDS, _FORMS)
            raise UsageError(f"--log-to {text}: there is no such logger", hint=hint)
        if kind == "tensorboard" and not target:
            raise UsageError("--log-to tensorboard has no directory", hint="--log-to tensorboard:runs")
        if find_spec(BACKENDS[kind].package) is None:
            message = f"--log-to {kind} needs the package {BACKENDS[kind].package}"
            raise UsageError(message, hint=f"pip install {BACKENDS[kind].pip}")
    if repeated := [text for i, text in enumerate(texts) if text in texts[:i]]:
        raise UsageError(f"--log-to {repeated[0]} is given twice")


def opened(text: str, name: str) -> Logger:
    """Start a run called ``name`` at the logger that ``text`` names.

    Raises:
        OutputError: if the directory of TensorBoard's files cannot be written.
        Exception: the backend's own, such as for a server that does not answer.
    """
    kind, _, target = text.partition(":")
    return import_module(f"ckptavg.loggers.{kind}").start(target, name)


def clean(name: str) -> str:
    """Return a name in the characters that every backend takes."""
    return re.sub(r"[^A-Za-z0-9_./-]+", "_", name).strip("_")


def plain(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return settings as numbers and texts, without those that are None."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in settings.items()
        if value is not None
    }
