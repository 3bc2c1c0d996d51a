"""Effect of TWA's learning rate, for validation and training data: python scripts/benchmark/rates.py

The trainings are the demo's: training labels are noisy, validation and test labels are not. Prints the losses and the
test metric of TWA's result, averaged over the trainings; the rate is relative to the candidates' mean distance from
their mean, and 0 is that mean (SWA).
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))

import task  # as in the demo
import train

from ckptavg.checkpoints.discover import discover
from ckptavg.coefficients import EVERYTHING, Coefficients
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture
from ckptavg.strategies.twa import TWA
from ckptavg.tasks.python_file import PythonTask


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found_scores: dict[tuple[str, str, float], list[tuple[float, float, float]]] = {}
    for seed in range(options.trainings):
        with tempfile.TemporaryDirectory() as folder:
            train.train(Path(folder), seed)
            with discover([Path(folder)]) as found:
                mixture = Mixture(PythonTask(str(task.__file__)), found.checkpoints, Run(device=torch.device("cpu")))
                unit = float(mixture.losses.distances(EVERYTHING).mean())
                for constraint, on, rate in itertools.product(("affine", "simplex"), ("val", "train"), options.rates):
                    mixture.restart()
                    twa = TWA(on=on, constraint=constraint, epochs=options.epochs, lr=(rate or 1) * unit)  # pyright: ignore
                    learned = twa.learn(mixture).coefficients if rate else None
                    answer = learned or Coefficients.uniform(range(mixture.n), mixture.n)
                    val, test = mixture.score(answer), mixture.score(answer, "test")
                    scores = found_scores.setdefault((constraint, on, rate), [])
                    scores.append((val.loss, test.loss, test.metric or 0.0))
    print("constraint  on     rate    val loss  test loss  test metric")
    for (constraint, on, rate), scores in found_scores.items():
        val, test, metric = (sum(column) / len(scores) for column in zip(*scores, strict=True))
        print(f"{constraint:10}  {on:5}  {rate:6g}  {val:8.4f}  {test:9.4f}  {metric:11.4f}")


if __name__ == "__main__":
    main()
