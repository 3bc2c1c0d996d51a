"""Report as one JSON object, the stable interface for scripts; ``report.schema.json`` describes its keys."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Final

from ckptavg.cost import Cost
from ckptavg.report.display import Report
from ckptavg.report.result import CandidateResult, FileScores, Gain, Landscape
from ckptavg.runtime.command_line import CommandLine
from ckptavg.score import Score

SCHEMA_VERSION: Final = 1
"""Version of the JSON Schema: the same as long as keys are only added."""


def to_dict(report: Report, run: CommandLine | None = None) -> dict[str, Any]:
    """Convert a report to values of JSON, as listed in docs/reference/report.md: its fields in their order.

    Args:
        run: the command that it is of, None for a call from Python.
    """
    head = {"schema_version": SCHEMA_VERSION, "kind": report.kind, "run": plain(run)}
    return head | (_landscape(report) if isinstance(report, Landscape) else plain(report))


def _landscape(landscape: Landscape) -> dict[str, Any]:
    q = landscape.surrogate
    figures = {
        "steps": landscape.steps,
        "loss_at_mean": q.value,
        "gradient": q.gradient_N.tolist(),
        "hessian": q.hessian_NN.tolist(),
        "curvature": q.curvature,
        "eigenvalues": landscape.eigenvalues,
        "predicted": landscape.predicted,
        "measured": landscape.measured,
        "spearman": landscape.spearman,
        "r_squared": landscape.r_squared,
        "plane": landscape.plane,
        "left_out": landscape.left_out,
        "warnings": landscape.warnings,
    }
    return plain(figures)


def to_json(report: Report, run: CommandLine | None = None) -> str:
    """Format a report as JSON text."""
    return json.dumps(to_dict(report, run), indent=2, allow_nan=False)


def plain(value: Any) -> Any:
    """Convert dataclasses to dictionaries by field, and what they hold to values of JSON; None for NaN and infinity."""
    if isinstance(value, Score):  # its values per example stay out
        figures = {"loss": value.loss, "metric": value.metric, "examples": value.examples}
        figures |= {"loss_noise": value.loss_noise, "metric_noise": None if value.metric is None else value.noise}
        figures |= {"invalid": value.invalid} if value.invalid else {}
        value = figures | ({"metrics": value.metrics} if value.metrics else {})
    elif isinstance(value, Gain):
        names = ("value", "low", "high", "separated", "units", "unit", "paired", "reason")
        named = {"metrics": value.others} if value.others else {}
        value = {name: getattr(value, name) for name in names} | named
    elif isinstance(value, Cost):
        value = {**vars(value), "seconds": round(value.seconds, 3)}
    elif isinstance(value, CandidateResult):
        value = {name: inner for name, inner in vars(value).items() if name != "columns"} | dict(value.columns)
    elif isinstance(value, FileScores):
        value = {"path": value.path, **value.scores}
    elif is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
