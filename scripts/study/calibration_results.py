"""The study's section on calibration: results of ``study.calibration``, a table, and a reliability diagram."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from study import figures
from study.interval import FEWEST, Interval
from study.tables import NONE, table

NAME: Final = "calibration.jsonl.gz"
PICTURE: Final = "calibration"
COMMAND: Final = "PYTHONPATH=scripts .venv/bin/python -m study.calibration docs/study/calibration.jsonl.gz"
CHECKPOINTS: Final = "mean of the checkpoints' probabilities"
SHOWN: Final = 20  # examples of a bin in the picture
SWAG, TUNED, DIAGONAL = "SWAG", "SWAG, scale by validation", "SWAG-Diagonal"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Test figures of the averaged predictions of ``models`` models; see `ckptavg.tasks.probabilities`."""

    models: int
    nll: float
    accuracy: float
    brier: float
    ece: float
    bins: Sequence[Mapping[str, float]]

    @property
    def overconfidence(self) -> float:
        """Return mean confidence minus accuracy."""
        _, confidence, accuracy = _merged(self.bins)
        return confidence - accuracy


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One training.

    Attributes:
        machine: versions and processors.
        n: number of candidates.
        scale: the scale that validation data chose.
        spread: relative standard deviation ‖σ‖/‖w̄‖.
        factor_error: error of averaging factors, for adapters.
        trained_seconds: processor time of the training; ``seconds`` is that of all runs of swag.
        rows: label → figures.
    """

    machine: str
    domain: str
    schedule: str
    seed: int
    n: int
    scale: float
    spread: float
    factor_error: float | None
    trained_seconds: float
    seconds: float
    rows: Mapping[str, Figures]

    @property
    def setting(self) -> str:
        """Return domain and schedule."""
        return f"{self.domain}, {self.schedule}"


def append(path: Path, result: Calibration) -> None:
    """Append one line, compressed."""
    with gzip.open(path, "at", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read(path: Path) -> list[Calibration]:
    """Read all results; none if there is no file."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines() if path.exists() else []
    return [_calibration(json.loads(line)) for line in lines]


def _calibration(stored: Mapping[str, Any]) -> Calibration:
    return Calibration(**{**stored, "rows": {label: Figures(**row) for label, row in stored["rows"].items()}})


def section(results: Sequence[Calibration], out: Path, pictures: str) -> list[str]:
    """Return the section, and draw its picture into the folder ``pictures`` below ``out``; nothing without results."""
    if not results:
        return []
    by_setting = {one.setting: [each for each in results if each.setting == one.setting] for one in results}
    first = results[0]
    text = (
        f"`ckptavg swag` on the last {first.n} checkpoints of each training, {first.rows[SWAG].models} draws: NLL, "
        "accuracy, Brier score and ECE (15 bins of equal width) of the averaged probabilities on test data, the "
        f"scale chosen on validation data in *{TUNED}*. Mean over seeds ± standard deviation; differences as above, "
        "below zero is better. *Over-confidence* is mean confidence minus accuracy."
    )
    head = ["setting", "predictions", "NLL", "NLL less SWA's", "accuracy, %", "Brier", "ECE, %", "ECE less SWA's"]
    rows = [row for one in by_setting.values() for row in _rows(one)]
    facts = [
        "setting",
        "seeds",
        "‖σ‖/‖w̄‖",
        "error of averaging factors",
        "scales by validation",
        "all three runs, of training",
    ]
    drawn = figures.installed()
    if drawn:
        _reliability(by_setting, out / pictures / f"{PICTURE}.svg")
    return [
        "## Calibration: SWAG",
        _answer(by_setting),
        f"    {COMMAND}",
        text,
        table([*head, "over-confidence, %"], rows),
        table(facts, [_facts(name, one) for name, one in by_setting.items()]),
        f"![Reliability diagrams]({Path(pictures, PICTURE)}.svg)" if drawn else "",
    ]


def _answer(by_setting: Mapping[str, Sequence[Calibration]]) -> str:
    """Return a list of where the draws predict better than the mean, and where they do not."""
    texts: dict[int | None, list[str]] = {-1: [], 1: [], 0: [], None: []}
    for name, mine in by_setting.items():
        change, over = _change(mine, SWAG, "nll"), fmean(one.rows["SWA"].overconfidence for one in mine)
        kind = None if change.count < FEWEST else change.sign
        texts[kind].append(f"{name} ({change:.3f}; SWA's over-confidence {100 * over:+.1f} %)")
    kinds = {-1: "lower", 1: "higher", 0: "not clearly different", None: f"of fewer than {FEWEST} seeds"}
    answers = "".join(f"\n- {kinds[kind]}: {', '.join(those)}" for kind, those in texts.items() if those)
    return f"NLL of the average over SWAG's draws, against that of the mean of the weights (SWA):\n{answers}"


def _change(mine: Sequence[Calibration], label: str, figure: str, scale: float = 1.0) -> Interval:
    return Interval.of([scale * (getattr(one.rows[label], figure) - getattr(one.rows["SWA"], figure)) for one in mine])


def _rows(mine: Sequence[Calibration]) -> list[list[str]]:
    rows: list[list[str]] = []
    for label in mine[0].rows:
        nll, accuracy, brier, ece, over = (
            [getattr(one.rows[label], figure) for one in mine]
            for figure in ("nll", "accuracy", "brier", "ece", "overconfidence")
        )
        reference = label == "SWA"
        rows.append([
            mine[0].setting, label, _spread(nll, 4), NONE if reference else f"{_change(mine, label, 'nll'):.4f}",
            _spread(accuracy, 2, 100), _spread(brier, 4), _spread(ece, 2, 100),
            NONE if reference else f"{_change(mine, label, 'ece', 100):.2f}", f"{100 * fmean(over):+.2f}",
        ])  # fmt: skip
    return rows


def _spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    mean = f"{scale * fmean(values):.{digits}f}"
    return f"{mean} ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else mean


def _facts(name: str, mine: Sequence[Calibration]) -> list[str]:
    errors = [one.factor_error for one in mine if one.factor_error is not None]
    cost = fmean(one.seconds for one in mine) / fmean(one.trained_seconds for one in mine)
    return [
        name, str(len(mine)), f"{fmean(one.spread for one in mine):.1%}", f"{fmean(errors):.1%}" if errors else NONE,
        ", ".join(f"{one.scale:g}" for one in mine), f"{cost:.0%}",
    ]  # fmt: skip


def _merged(bins: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """Return number, mean confidence and accuracy of the examples of several bins."""
    count = sum(each["examples"] for each in bins)
    means = [sum(each["examples"] * each[key] for each in bins) / count for key in ("confidence", "accuracy")]
    return count, means[0], means[1]


@figures.style()
def _reliability(by_setting: Mapping[str, Sequence[Calibration]], path: Path) -> None:
    """Draw accuracy over confidence for each setting, over all seeds; bins of few examples are left out."""
    from matplotlib.figure import Figure

    columns, lines = min(3, len(by_setting)), -(-len(by_setting) // 3)
    figure = Figure(figsize=(3.2 * columns, 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, mine) in zip(grid, by_setting.items(), strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for label, colour in (("SWA", "tab:blue"), (SWAG, "tab:orange")):
            bins = [each for one in mine for each in one.rows[label].bins]
            merged = [
                _merged([each for each in bins if each["low"] == low]) for low in sorted({b["low"] for b in bins})
            ]
            x, y = zip(*(point for count, *point in merged if count >= SHOWN), strict=True)
            axes.plot(x, y, "-o", markersize=3, linewidth=1, color=colour, label=label)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("confidence", fontsize=9)
        axes.set_ylabel("accuracy", fontsize=9)
    grid[0].legend(fontsize=9)
    for axes in grid[len(by_setting) :]:
        axes.set_axis_off()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
