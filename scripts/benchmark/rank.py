"""Where SeWA's choice ranks among all subsets, for several trainings, noise seeds and learning rates.

python scripts/benchmark/rank.py: the demo's network, 5 of the last 12 checkpoints, validation loss of all 792 subsets.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))

import task  # the demo's
import train

from ckptavg.coefficients import Coefficients
from ckptavg.discover import discover
from ckptavg.mixture import Mixture
from ckptavg.strategies.sewa import SeWA
from ckptavg.tasks.python_file import PythonTask
from ckptavg.window import Window


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--noise-seeds", type=int, default=4)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks: dict[float, list[int]] = {lr: [] for lr in options.lr}
    for seed in range(options.trainings):
        with tempfile.TemporaryDirectory() as folder:
            train.train(Path(folder), seed)
            with discover([Path(folder)], Window(last=12)) as found:
                mixture = Mixture(PythonTask(str(task.__file__)), found.checkpoints, device=torch.device("cpu"))
                subsets = list(itertools.combinations(range(12), 5))
                losses = {subset: mixture.score(Coefficients.uniform(subset, 12)).loss for subset in subsets}
                order = sorted(losses, key=losses.__getitem__)
                for lr, noise in itertools.product(options.lr, range(options.noise_seeds)):
                    mixture.generator.manual_seed(noise)
                    ranks[lr].append(order.index(SeWA(k=5, lr=lr).learn(mixture).coefficients.selected))
    for lr, found_ranks in ranks.items():
        within = sum(rank < 0.01 * len(subsets) for rank in found_ranks)
        best = sum(rank == 0 for rank in found_ranks)
        print(
            f"lr {lr}: within the best 1 % in {within} of {len(found_ranks)}, the best in {best}; ranks {found_ranks}"
        )


if __name__ == "__main__":
    main()
