"""Cost of SeWA's two solvers to reach the same loss: PYTHONPATH=scripts python scripts/benchmark/solver.py

One pass of the quadratic solver answers every K; its 8 best subsets of K = 5 are then scored. The Gumbel solver is run
with increasing numbers of steps, each with several noise seeds, until nine in ten of its subsets have a validation loss
no higher than the quadratic's: a user cannot pick the lucky run in advance. Cost is in forward equivalents, as passes
over the validation data: a forward counts 1, a backward 2, a double backward 4, a forward-mode pass 2; passes for
BatchNorm statistics, over training data, and the score of the result are included. Trainings are those of the study.
"""

import argparse
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from study.domains import domain
from study.job import Training, write_task
from study.training import train

from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture
from ckptavg.strategies.sewa import SeWA
from ckptavg.surrogate.subsets import best_subsets
from ckptavg.tasks.python_file import PythonTask

STEPS = (25, 50, 100, 200, 400)
K = 5


class Found(NamedTuple):
    """Validation loss of a subset, and its cost: passes over the validation data, and seconds."""

    loss: float
    passes: float
    seconds: float


class Case(NamedTuple):
    """One training: the quadratic's result, its seconds for every K without a pass, and the Gumbel runs by steps."""

    quadratic: Found
    searched: float
    proofs: Sequence[str]
    gumbel: dict[int, list[Found]]

    def reached(self, steps: int) -> int:
        """Return how many Gumbel runs reached the quadratic's loss."""
        return sum(found.loss <= self.quadratic.loss for found in self.gumbel[steps])


def ran(mixture: Mixture, strategy: SeWA, noise: int) -> Found:
    """Learn from scratch and score the result; cached work is charged as if it were not cached."""
    mixture.restart()
    mixture.generator.manual_seed(noise)
    start = time.perf_counter()
    score = mixture.score(strategy.learn(mixture).coefficients)
    examples = mixture.meter["forward_examples"] + 2 * mixture.meter["backward_examples"]
    size = mixture.task.examples("val")
    assert score.loss is not None and size
    return Found(score.loss, examples / size, time.perf_counter() - start)


@contextmanager
def trained(name: str, n: int, seed: int, every: int | None) -> Generator[Mixture]:
    """Run a training of the study that is long enough for ``n`` checkpoints after its first third."""
    kind = domain(name)
    every = every or kind.every
    with tempfile.TemporaryDirectory() as scratch:
        folder, task, device = Path(scratch) / "ckpts", Path(scratch) / "study_task.py", torch.device("cpu")
        write_task(task, name, seed, None)
        steps = (n + n // 2) * every
        training = Training(folder=folder, steps=steps, every=every, schedule="constant", seed=seed, device=device)
        train(kind.job(seed, None), training)
        with discover([folder], Window(last=n)) as found:
            mixture = Mixture(PythonTask(str(task)), found.checkpoints, Run(device=device, seed=seed))
            mixture.prepare()
            yield mixture


def measure(name: str, n: int, options: argparse.Namespace) -> tuple[list[Case], int]:
    """Measure all trainings, and the steps that Gumbel needed (0: more than were tried)."""
    with ExitStack() as stack:
        mixtures = [stack.enter_context(trained(name, n, seed, options.every)) for seed in range(options.seeds)]
        cases: list[Case] = []
        for mixture in mixtures:
            quadratic = ran(mixture, SeWA(k=K, solver="quadratic"), 0)
            start = time.perf_counter()
            proofs = [best_subsets(mixture.losses.surrogate(), k, 8).proof for k in range(1, n + 1)]
            cases.append(Case(quadratic, time.perf_counter() - start, proofs, {}))
        for steps in STEPS:
            for mixture, case in zip(mixtures, cases, strict=True):
                case.gumbel[steps] = [ran(mixture, SeWA(k=K, steps=steps), noise) for noise in range(options.noise)]
            if sum(case.reached(steps) for case in cases) >= 0.9 * options.noise * len(cases):
                return cases, steps
    return cases, 0


def main() -> None:
    """Print a line for each kind of training and each N."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--domains", nargs="+", default=["digits-cnn", "source-lines"])
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--seeds", type=int, default=1, help="trainings")
    parser.add_argument("--noise", type=int, default=4, help="Gumbel runs on each of them")
    parser.add_argument("--every", type=int, help="steps between two checkpoints; default the study's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"K = {K}, {options.seeds} trainings, {options.noise} Gumbel runs on each; passes are medians")
    print(f"{'training':13} {'N':>3} {'quadratic':>9} {'Gumbel':>9} {'ratio':>6} {'steps':>6} {'as good':>8} "
          f"{'seconds':>14} {'every K, s':>10}  proofs for every K")  # fmt: skip
    for name in options.domains:
        for n in options.candidates:
            cases, enough = measure(name, n, options)
            steps = enough or STEPS[-1]
            runs = [found for case in cases for found in case.gumbel[steps]]
            quadratic, gumbel = (median(f.passes for f in some) for some in ([c.quadratic for c in cases], runs))
            seconds = "/".join(f"{median(f.seconds for f in s):.1f}" for s in ([c.quadratic for c in cases], runs))
            proofs = [proof for case in cases for proof in case.proofs]
            shares = ", ".join(f"{proof} {proofs.count(proof) / len(proofs):.0%}" for proof in dict.fromkeys(proofs))
            more = " " if enough else ">"
            good = f"{sum(case.reached(steps) for case in cases)} of {len(runs)}"
            print(f"{name:13} {n:3} {quadratic:9.1f} {more}{gumbel:8.1f} {quadratic / gumbel:6.2f} {steps:6} {good:>8} "
                  f"{seconds:>14} {median(case.searched for case in cases):10.2f}  {shares}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
