"""Measure SWAG on trainings of the study: NLL, accuracy, Brier score and ECE of single models and of averages of many.

python -m study.calibration docs/study/calibration.jsonl.gz    # trainings that are in the file are not computed again
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

import ckptavg
from ckptavg.average import lora
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.coefficients import Coefficients
from ckptavg.report.posterior import Predictions
from ckptavg.score import Score
from study.calibration_results import CHECKPOINTS, DIAGONAL, SWAG, TUNED, Calibration, Figures, append, read
from study.cell import Cell, Trained, machine, train_cell
from study.plan import FULL, Plan

SETTINGS: Final[Mapping[tuple[str, str], int]] = {
    ("spam-lora", "constant"): 3,
    ("spam-lora", "cosine"): 3,
    ("fashion", "constant"): 3,
    ("fashion", "cosine"): 3,
    ("fashion-noise", "constant"): 3,
    ("fashion-noise", "cosine"): 3,
    ("digits-cnn", "constant"): 5,
    ("digits-cnn", "cosine"): 5,
}
"""Domain and schedule → number of seeds."""

PREDICT: Final = """

def predict(output, batch):
    output = output(batch[0]) if job.forward is None else output
    return getattr(output, "logits", output).softmax(dim=1)


def labels(batch):
    return batch[-1]
"""
"""Functions added to a task file, for the probabilities of classes."""


def measure(cell: Cell, whole: Plan = FULL, draws: int = 30) -> Calibration:
    """Train a cell, and measure averages of its checkpoints' and of SWAG's predictions on test data."""
    plan = whole.of(cell.domain)
    window = Window(last=plan.last)
    with tempfile.TemporaryDirectory(prefix="ckptavg-calibration-") as root:
        before = time.process_time()
        trained = train_cell(cell, plan, Path(root))
        with trained.task.open("a", encoding="utf-8") as file:
            file.write(PREDICT)
        started = time.process_time()
        results = _results(trained, last=plan.last, draws=draws)
        seconds = time.process_time() - started
        with trained.mixture(window) as mixture:
            singles = [(single, None) for single in Coefficients.singles(mixture.n)]
            checkpoints = mixture.average_predictions(singles, "test")
        with discover([trained.folder], window) as found:
            adapters = any(trained.folder.glob("*/adapter_config.json"))
            mean = Coefficients.uniform(range(mixture.n), mixture.n)
            error = lora.factor_error(found.checkpoints, mean) if adapters else None
    plain = results[SWAG].predictions["test"]
    rows = {
        "last": _averaged(plain["last"]),
        "SWA": _averaged(plain["swa"]),
        CHECKPOINTS: _figures(*checkpoints, models=mixture.n),
        **{label: _averaged(result.predictions["test"]["swag"]) for label, result in results.items()},
    }
    spread = results[SWAG].spread
    assert spread is not None
    return Calibration(
        machine=machine(trained.device), domain=cell.domain, schedule=cell.schedule, seed=cell.seed, n=mixture.n,
        scale=results[TUNED].gaussian["scale"], spread=spread, factor_error=error,
        trained_seconds=started - before, seconds=seconds, rows=rows,
    )  # fmt: skip


def _results(trained: Trained, **options: Any) -> dict[str, ckptavg.PosteriorResult]:
    """Return label → result of ``ckptavg swag``; equal draws are computed once."""

    def swag(**settings: Any) -> ckptavg.PosteriorResult:
        return ckptavg.swag(
            trained.folder, task=trained.task, output=trained.folder.parent / "mean.safetensors", force=True,
            seed=trained.seed, device=str(trained.device), **options, **settings,
        )  # fmt: skip

    tuned = swag(scale="auto")
    paper = tuned if tuned.gaussian["scale"] == 0.5 else swag()
    return {SWAG: paper, TUNED: tuned, DIAGONAL: swag(deviations=0)}


def _averaged(predictions: Predictions) -> Figures:
    """Return the figures of averaged predictions."""
    return _figures(predictions.score, predictions.bins, models=predictions.models)


def _figures(score: Score, bins: Sequence[Mapping[str, float]], *, models: int) -> Figures:
    assert score.loss is not None
    metrics = {name: metric for name, metric in score.metrics.items() if metric is not None}
    return Figures(
        models=models, nll=score.loss, accuracy=metrics["accuracy"], brier=metrics["brier"], ece=metrics["ece"],
        bins=[dict(each) for each in bins],
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the settings, seed by seed."""
    parser = argparse.ArgumentParser(prog="study.calibration", description=__doc__)
    parser.add_argument("results", type=Path, help="compressed file that results are added to")
    path = parser.parse_args(arguments).results
    torch.set_num_threads(1)
    done = {(one.domain, one.schedule, one.seed) for one in read(path)}
    for seed, ((domain, schedule), seeds) in itertools.product(range(max(SETTINGS.values())), SETTINGS.items()):
        if seed < seeds and (domain, schedule, seed) not in done:
            result = measure(Cell(domain=domain, seed=seed, schedule=schedule))
            append(path, result)
            print(f"{domain}, {schedule}, seed {seed}: {result.seconds:.0f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
