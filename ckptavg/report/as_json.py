"""Report as one JSON object, the stable interface for scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ckptavg.checkpoints.listing import LeftOut
from ckptavg.cost import Cost
from ckptavg.report.result import Comparison, Landscape, Result, StrategyResult
from ckptavg.runtime import version
from ckptavg.score import Score


def to_dict(result: Result) -> dict[str, Any]:
    """Convert a report to plain data; docs/reference.md lists its keys."""
    matrix, output = result.matrix, result.output
    return {
        "strategy": result.strategy,
        "settings": dict(result.settings),
        "seed": result.seed,
        "version": version.own(),
        "candidates": [
            {
                "path": str(candidate.path),
                "step": candidate.step,
                "coefficient": candidate.coefficient,
                "score": _score(candidate.score),
                **candidate.columns,
            }
            for candidate in result.candidates
        ],
        "left_out": _left_out(result.left_out),
        "scores": {
            **{split: _score(score) for split, score in result.scores.items()},
            "baselines": {
                name: {split: _score(score) for split, score in scores.items()}
                for name, scores in result.baselines.items()
            },
        },
        "groups": [list(prefixes) for prefixes in result.groups],
        "holdout": result.holdout,
        "best_step": result.best_step,
        "verdict": result.verdict,
        "worse": result.worse,
        "replaced": result.replaced,
        "cost": _cost(result.cost),
        "matrix": matrix
        and {
            "bits": matrix.bits,
            "group_size": matrix.group_size,
            "bytes": matrix.bytes,
            "error": matrix.error,
            "offload": matrix.offload,
            "precision": matrix.precision,
            "compiled": matrix.compiled,
        },
        "tables": {title: [dict(row) for row in rows] for title, rows in result.tables.items()},
        "trace": {name: list(values) for name, values in result.trace.items()},
        "warnings": list(result.warnings),
        "output": output
        and {
            "path": str(output.path),
            "sha256": output.sha256,
            "bytes": output.bytes,
            "dtype": output.dtype,
            "not_averaged": list(output.not_averaged),
            "recomputed": list(output.recomputed),
        },
    }


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """Convert a comparison: the winner's report, plus every contestant under ``strategies``."""
    return {
        **to_dict(comparison.result),
        "winner": comparison.winner,
        "strategies": [_strategy_result(contestant) for contestant in comparison.contestants],
    }


def landscape_to_dict(landscape: Landscape) -> dict[str, Any]:
    """Convert a landscape to plain data."""
    q, plane = landscape.surrogate, landscape.plane
    return {
        "steps": list(landscape.steps),
        "loss_at_mean": q.value,
        "gradient": q.gradient_N.tolist(),
        "hessian": q.hessian_NN.tolist(),
        "curvature": q.curvature,
        "eigenvalues": list(landscape.eigenvalues),
        "predicted": list(landscape.predicted),
        "measured": list(landscape.measured),
        "spearman": landscape.spearman,
        "r_squared": landscape.r_squared,
        "plane": plane and {"mixtures": plane.names, "u": plane.u, "v": plane.v, "losses": plane.losses},
        "left_out": _left_out(landscape.left_out),
        "warnings": list(landscape.warnings),
    }


def to_json(report: Result | Comparison | Landscape) -> str:
    """Format a report as JSON text."""
    if isinstance(report, Landscape):
        data = landscape_to_dict(report)
    else:
        data = comparison_to_dict(report) if isinstance(report, Comparison) else to_dict(report)
    return json.dumps(_without_nan(data), indent=2, ensure_ascii=True, allow_nan=False)


def _left_out(files: Sequence[LeftOut]) -> list[dict[str, str]]:
    return [{"path": str(file.path), "reason": file.reason, "kind": file.kind} for file in files]


def _strategy_result(result: StrategyResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "strategy": result.strategy,
        "settings": dict(result.settings),
        "coefficients": list(result.coefficients),
        "groups": [list(prefixes) for prefixes in result.groups],
        "used": result.used,
        "scores": {split: _score(score) for split, score in result.scores.items()},
        "over_last": {
            split: {
                "value": gain.value,
                "low": gain.low,
                "high": gain.high,
                "separated": gain.separated,
                "units": gain.units,
                "paired": gain.paired,
            }
            for split, gain in result.gains.items()
        },
        "cost": _cost(result.cost),
        "notes": list(result.notes),
    }


def _cost(cost: Cost | None) -> dict[str, Any] | None:
    return cost and {
        "forward_batches": cost.forward_batches,
        "backward_batches": cost.backward_batches,
        "evaluations": cost.evaluations,
        "seconds": round(cost.seconds, 3),
        "epochs": cost.epochs,
        "epochs_of": cost.epochs_of,
    }


def _score(score: Score | None) -> Mapping[str, float | int | str | None] | None:
    if score is None:
        return None
    figures = {"loss": score.loss, "metric": score.metric, "examples": score.examples}
    return {**figures, "invalid": score.invalid} if score.invalid else figures


def _without_nan(value: Any) -> Any:
    """Replace every NaN and infinity, which JSON does not have, with None."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
