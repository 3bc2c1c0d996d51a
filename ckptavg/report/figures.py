"""Figures of a JSON report for a logger: scalars by name, curves over training steps, settings."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptavg.loggers import Record, clean, plain
from ckptavg.report.json_values import coefficients, figures
from ckptavg.report.markdown import markdown


def record(report: Mapping[str, Any]) -> Record:
    """Return what a logger shows of a report that `ckptavg.report.as_json.to_dict` made."""
    run = {"command": report["run"]["command"]} if report["run"] else {}
    settings = {"strategy": report["strategy"], "winner": report.get("winner"), "seed": report["seed"]}
    settings |= {"version": report["version"], "candidates": len(report["candidates"]), **run, **report["settings"]}
    return Record(
        settings=plain(settings), scalars=_finite(_scalars(report)), series=_series(report), verdict=report["verdict"],
        markdown=markdown([report]), report=json.dumps(report, indent=2, allow_nan=False) + "\n",
    )  # fmt: skip


def _finite(values: Iterator[tuple[str, float | None]]) -> dict[str, float]:
    return {clean(name): float(value) for name, value in values if value is not None and math.isfinite(value)}


def _scalars(report: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield from _scored("scores", report["scores"])
    for name, scores in report["baselines"].items():
        yield from _scored(f"baselines/{name}", scores)
    for name, gain in report["gains"].items():
        for end in ("value", "low", "high"):
            yield f"gains/{name}/{end}", gain[end]
    for row in report.get("strategies", ()):
        place, last = f"strategies/{row['name']}", [*row["over_last"]][-1]
        yield from _scored(place, row["scores"])
        yield from ((f"{place}/{key}", row[key]) for key in ("used", "held_out"))
        yield from ((f"{place}/{key}", row["cost"][key]) for key in ("passes", "seconds"))
        yield f"{place}/over_last", row["over_last"][last]["value"]
    for split, models in report.get("predictions", {}).items():
        for name, predictions in models.items():
            yield from _scored(f"predictions/{name}", {split: predictions["score"]})
    yield from ((name, report.get(name)) for name in ("held_out", "effective", "best_step", "spread"))
    numbers = report["cost"] or {}
    yield from ((f"cost/{name}", value) for name, value in numbers.items() if not isinstance(value, str))
    if report["output"]:
        yield "output/bytes", report["output"]["bytes"]


def _scored(place: str, scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for split, score in scores.items():
        yield from ((f"{place}/{split}/{name}", value) for name, (value, _) in figures(score).items())


def _series(report: Mapping[str, Any]) -> dict[str, Sequence[tuple[int, float]]]:
    """Return the candidates' scores, coefficients and columns over the training step, and the curves of the search.

    The candidates of several runs may have equal steps: the second ones are in curves of their own.
    """
    curves, seen = dict[str, list[tuple[int, float]]](), dict[int, int]()
    for row in report["candidates"]:
        step = row["step"]
        seen[step] = seen.get(step, 0) + 1
        place, betas = "candidates" if seen[step] == 1 else f"candidates-{seen[step]}", coefficients(row)
        values = {name: row[name] for name in row if name not in ("path", "step", "coefficient", "score")}
        values |= {"coefficient": betas[0]} if len(betas) == 1 else {"least": min(betas), "greatest": max(betas)}
        values |= {name: value for name, (value, _) in figures(row["score"]).items()}
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(clean(f"{place}/{name}"), []).append((step, float(value)))
    for name, values in report["trace"].items():
        points = [(i, float(v)) for i, v in enumerate(values) if isinstance(v, int | float) and math.isfinite(v)]
        curves |= {clean(f"trace/{name}"): points} if points else {}
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}
