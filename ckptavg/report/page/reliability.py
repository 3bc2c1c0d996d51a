"""Reliability diagrams of averaged predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ckptavg.report.json_values import figures
from ckptavg.report.page.figure import Plot, Table, colour, draw
from ckptavg.report.page.numbers import Report, data, signed

_NAMES: Final = {"last": "last candidate", "swa": "mean (SWA)", "swag": "average over draws (SWAG)"}


def plots(report: Report, key: str) -> list[Plot]:
    """Return a row of diagrams per split: none where the task gives no class probabilities."""
    return [
        _plot(split, models, f"{key}-{split}") for split, models in report.get("predictions", {}).items()
        if any(model["bins"] for model in models.values())
    ]  # fmt: skip


def tables(report: Report) -> list[Table]:
    """Return the scores of the predictions of each split."""
    found: list[Table] = []
    for split, models in report.get("predictions", {}).items():
        columns = list(dict.fromkeys(name for model in models.values() for name in figures(model["score"])))
        columns = [name for name in columns if name != "nll"]  # it is the loss
        rows = [
            [_name(name), f"{model['models']:,}"]
            + [signed(figures(model["score"]).get(column, (None, None))[0]) for column in columns]
            for name, model in models.items()
        ]
        headings = ["predictions", "models", *("NLL" if name == "loss" else name for name in columns)]
        found.append(Table(headings=headings, rows=rows, title=f"Predictions, {data(split)}"))
    return found


def _plot(split: str, models: Mapping[str, Any], key: str) -> Plot:
    title = f"Reliability: confidence against accuracy, {data(split)}"

    def paint(figure: Any, narrow: bool) -> None:
        shape = (len(models), 1) if narrow else (1, len(models))
        every: Any = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
        for axes, (name, model) in zip(every.flat, models.items(), strict=True):
            bins = [b for b in model["bins"] if b["examples"]]
            axes.plot((0, 1), (0, 1), "--", color=colour("last"), lw=1.2)
            most = max((b["examples"] for b in bins), default=1)
            for b in bins:
                axes.bar(
                    (b["low"] + b["high"]) / 2, b["examples"] / most * 0.25, width=(b["high"] - b["low"]) * 0.9,
                    color=colour("rule"), zorder=1,
                )  # fmt: skip
            if bins:
                axes.plot(
                    [b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", color=colour("average"), ms=5
                )
            axes.set_title(_name(name))
            axes.set(xlim=(0, 1), ylim=(0, 1.02), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        every[-1, 0].set(xlabel="confidence", ylabel="accuracy")

    rows = [
        [_name(name), f"{b['low']:.2f} to {b['high']:.2f}", f"{b['examples']:,.0f}",
         signed(b["confidence"]), signed(b["accuracy"])]
        for name, model in models.items() for b in model["bins"] if b["examples"]
    ]  # fmt: skip
    gaps = [f"{_name(name)}: expected calibration error {_error(model['bins']):.3f}" for name, model in models.items()]
    summary = f"{'; '.join(gaps)}."
    return Plot(
        title=title, summary=summary, svgs=draw(key, title, summary, paint, height=300, narrow_height=820),
        note="Dashed: confidence equals accuracy; below it the model is too sure. Bars: number of examples.",
        table=Table(headings=["model", "bin", "examples", "confidence", "accuracy"], rows=rows, title=title),
    )  # fmt: skip


def _name(model: str) -> str:
    return _NAMES.get(model, model)


def _error(bins: Any) -> float:
    total = sum(b["examples"] for b in bins) or 1
    return sum(b["examples"] * abs(b["confidence"] - b["accuracy"]) for b in bins if b["examples"]) / total
