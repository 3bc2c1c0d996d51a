"""The report as one JSON object: the contract for scripts."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from ckptavg.objective import Score
from ckptavg.result import Result


def to_dict(result: Result) -> dict[str, Any]:
    """The report as plain data; its keys are documented in the README."""
    cost, output = result.cost, result.output
    return {
        "strategy": result.strategy,
        "settings": dict(result.settings),
        "seed": result.seed,
        "version": version("ckptavg"),
        "candidates": [
            {
                "path": str(one.path),
                "step": one.step,
                "coefficient": one.coefficient,
                "score": _score(one.score),
                **one.columns,
            }
            for one in result.candidates
        ],
        "left_out": [{"path": str(one.path), "reason": one.reason} for one in result.left_out],
        "scores": {
            **{split: _score(score) for split, score in result.scores.items()},
            "baselines": {
                name: {split: _score(score) for split, score in scores.items()}
                for name, scores in result.baselines.items()
            },
        },
        "best_step": result.best_step,
        "verdict": result.verdict,
        "worse": result.worse,
        "cost": cost
        and {
            "forward_batches": cost.forward_batches,
            "backward_batches": cost.backward_batches,
            "seconds": round(cost.seconds, 3),
            "epochs": cost.epochs,
            "epochs_of": cost.epochs_of,
        },
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


def to_json(result: Result) -> str:
    """The report as JSON text."""
    return json.dumps(to_dict(result), indent=2, ensure_ascii=True)


def _score(score: Score | None) -> dict[str, float | int | None] | None:
    return score and {"loss": score.loss, "metric": score.metric, "examples": score.examples}
