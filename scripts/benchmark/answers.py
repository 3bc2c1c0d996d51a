"""Are the default answers good at every number of candidates? python scripts/benchmark/answers.py [--candidates 10 100]

Trainings of a small network and of softmax regression on scikit-learn's digits with noisy training labels, one
checkpoint every few steps, the last N of them. SeWA at defaults is compared with a swap search from many starts, which
scores all K(N−K) swaps of each mask; SeWA and TWA with the best single candidate, the mean of all, and LAWA of the last
K. All figures are validation losses, seconds are of a whole search. The last lines are the gates: PASS or MISS.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from ckptavg.checkpoints.discover import discover
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.objective import Strategy
from ckptavg.objective.mixture import Mixture
from ckptavg.strategies.sewa import SeWA
from ckptavg.strategies.twa import TWA
from ckptavg.tasks.python_file import PythonTask

K, EVERY, EXAMPLES = 5, 8, 800
AUTO = 20
NETWORKS = {
    "regression": lambda: nn.Sequential(nn.Linear(64, 10)),
    "network": lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
}
TASK = """
import sys
sys.path.insert(0, {folder!r})
import answers
def model(): return answers.NETWORKS[{name!r}]()
def loss(model, batch): return answers.cross_entropy(model(batch[0]), batch[1], reduction="none")
def val_dataloader(): return list(zip(*(part.split(100) for part in answers.digits({seed})[1])))
def test_dataloader(): return [answers.digits({seed})[2]]
"""


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return training examples, a quarter of them with a random label, 400 clean validation examples, and the rest."""
    from sklearn.datasets import load_digits

    data = load_digits()
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=draws)
    x, y = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    noisy = torch.where(torch.rand(EXAMPLES, generator=draws) < 0.25, torch.randint(10, (EXAMPLES,), generator=draws),
                        y[:EXAMPLES])  # fmt: skip
    val, rest = slice(EXAMPLES, EXAMPLES + 400), slice(EXAMPLES + 400, None)
    return (x[:EXAMPLES], noisy), (x[val], y[val]), (x[rest], y[rest])


@contextmanager
def trained(name: str, n: int, seed: int) -> Generator[tuple[Mixture, Tensor]]:
    """Train, after a third as many checkpoints that are not used; yield the mixture and the candidates' weights."""
    torch.manual_seed(seed)
    model, ((x, y), *_) = NETWORKS[name](), digits(seed)
    descent = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    with tempfile.TemporaryDirectory() as scratch:
        folder, task = Path(scratch) / "ckpts", Path(scratch) / "answers_task.py"
        folder.mkdir()
        rows: list[Tensor] = []
        for step in range(1, (n + n // 3) * EVERY + 1):
            chosen = torch.randint(EXAMPLES, (32,))
            descent.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            descent.step()
            if step % EVERY == 0 and step > n // 3 * EVERY:
                torch.save(model.state_dict(), folder / f"step-{step}.pt")
                rows.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        task.write_text(TASK.format(folder=str(Path(__file__).parent), name=name, seed=seed))
        with discover([folder]) as found:
            mixture = Mixture(PythonTask(str(task)), found.checkpoints, Run(device=torch.device("cpu"), seed=seed))
            mixture.prepare()
            yield mixture, torch.stack(rows)


def swap_search(name: str, weights_ND: Tensor, seed: int, starts: int) -> float:
    """Return the lowest validation loss of a subset of K: steepest descent by swaps from random and the last masks."""
    model, (_, (x, y), _), n = NETWORKS[name](), digits(seed), len(weights_ND)
    shapes = {key: value.shape for key, value in model.named_parameters()}

    def loss(w_D: Tensor) -> Tensor:
        pieces = w_D.split([shape.numel() for shape in shapes.values()])
        state = {key: piece.view(shape) for (key, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return cross_entropy(functional_call(model, state, (x,)), y)

    def losses(masks_MK: Tensor) -> Tensor:
        return torch.cat([vmap(loss)(weights_ND[part].mean(dim=1)) for part in masks_MK.split(200)])

    draws, best = torch.Generator().manual_seed(seed), float("inf")
    with torch.no_grad():
        alone_N = losses(torch.arange(n)[:, None])
        firsts = [torch.arange(n - K, n), alone_N.argsort()[:K]]
        for start in [*firsts, *(torch.randperm(n, generator=draws)[:K] for _ in range(starts - len(firsts)))]:
            mask, lowest = start.clone(), float(losses(start[None])[0])
            while True:
                others = torch.tensor([j for j in range(n) if j not in mask.tolist()], dtype=torch.int64)
                near = mask.repeat(K * len(others), 1)
                near[torch.arange(len(near)), torch.arange(K).repeat_interleave(len(others))] = others.repeat(K)
                values = losses(near)
                if not len(values) or float(values.min()) >= lowest - 1e-7:
                    break
                mask, lowest = near[values.argmin()], float(values.min())
            best = min(best, lowest)
    return best


class Answer(NamedTuple):
    """Losses of an answer on validation data, on fresh examples and held out, and the cost of its search."""

    loss: float
    fresh: float
    held_out: float | None
    passes: float
    seconds: float


def answer(mixture: Mixture, strategy: Strategy) -> Answer:
    """Search, without what other searches on this mixture have measured: known scores are charged, not free."""
    mixture.restart()
    start = time.process_time()  # other work of the machine is not counted
    learned = strategy.learn(mixture)
    seconds = time.process_time() - start
    loss, passes = mixture.score(learned.coefficients).loss or 0.0, mixture.cost().passes or 0.0
    return Answer(loss, mixture.score(learned.coefficients, "test").loss or 0.0, learned.held_out, passes, seconds)


def main() -> None:
    """Print a line for each training, and the gates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--starts", type=int, default=4, help="of the swap search")
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = {"sewa within 1 % of the swap search": -1.0, "sewa not above a plain average": -1.0,
             "twa not above SWA or the best single": -1.0,
             "sewa and twa --solver quadratic not above SWA or the best single": -1.0,
             f"--k auto in {AUTO} s of processor time": -1.0}  # fmt: skip
    print(f"{'training':10} {'N':>4} {'swaps':>7} {'single':>7} {f'lawa-{K}':>7} {'swa':>7} {'sewa':>7} {'passes':>6} "
          f"{'s':>5} {'affine':>7} {'simplex':>7} {'passes':>6} {'s':>5}")  # fmt: skip
    for name in NETWORKS:
        for n in options.candidates:
            for seed in range(options.seeds):
                with trained(name, n, seed) as (mixture, weights_ND):
                    best = swap_search(name, weights_ND, seed, options.starts)
                    plain = [*Coefficients.singles(n), Coefficients.uniform(range(n - K, n), n),
                             Coefficients.uniform(range(n), n)]  # fmt: skip
                    *singles, lawa, swa = (mixture.score(each).loss or 0.0 for each in plain)
                    sewa, affine = answer(mixture, SeWA(k=K)), answer(mixture, TWA())
                    simplex = answer(mixture, TWA(constraint="simplex"))
                    print(f"{name:10} {n:4} {best:7.4f} {min(singles):7.4f} {lawa:7.4f} {swa:7.4f} {sewa.loss:7.4f} "
                          f"{sewa.passes:6.0f} {sewa.seconds:5.1f} {affine.loss:7.4f} {simplex.loss:7.4f} "
                          f"{simplex.passes:6.0f} {simplex.seconds:5.1f}", flush=True)  # fmt: skip
                    held, auto = (answer(mixture, quadratic) for quadratic in
                                  (TWA(solver="quadratic"), SeWA(solver="quadratic", k="auto")))  # fmt: skip
                    for what, one in {"twa": held, "sewa --k auto": auto}.items():
                        print(f"  {what} --solver quadratic: {one.loss:.4f}, held out {one.held_out or math.nan:.4f}, "
                              f"{one.passes:.0f} passes, {one.seconds:.1f} s")  # fmt: skip
                    print(f"  on fresh examples: swa {mixture.score(plain[-1], 'test').loss:.4f}, "
                          f"sewa {sewa.fresh:.4f}, twa {affine.fresh:.4f}, simplex {simplex.fresh:.4f}; "
                          f"quadratic twa {held.fresh:.4f}, sewa {auto.fresh:.4f}", flush=True)  # fmt: skip
                    excess = (sewa.loss / best - 1.01, sewa.loss - min(*singles, lawa, swa),
                              max(affine.loss, simplex.loss) - min(*singles, swa),
                              max(held.loss, auto.loss) - min(*singles, swa), auto.seconds - AUTO)  # fmt: skip
                    worst = {gate: max(pair) for gate, *pair in zip(worst, worst.values(), excess, strict=True)}
    for gate, value in worst.items():
        print(f"{'PASS' if value <= 1e-6 else 'MISS'} {gate}")


if __name__ == "__main__":
    main()
