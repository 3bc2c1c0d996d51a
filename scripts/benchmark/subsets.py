"""Swap search for the 8 best subsets against enumeration: PYTHONPATH=scripts python scripts/benchmark/subsets.py"""

import argparse
import math
import time
from unittest.mock import patch

import torch
from solver import trained

from ckptavg.surrogate import Surrogate, subsets

REAL = {  # trainings of the study, and N
    "digits-cnn": (24, 36, 60), "digits-vit": (24, 48), "source-lines": (30, 60), "source-bytes": (40,),
    "cartpole": (36,), "logistic": (50,),
}  # fmt: skip
COUNT = 8


def similar(q: Surrogate, seed: int) -> Surrogate:
    """Return a surrogate with the same eigenvalues and slopes along them, but random eigenvectors."""
    draws = torch.Generator().manual_seed(seed)
    lambda_N, vectors_NN = torch.linalg.eigh(q.hessian_NN)
    order = lambda_N.abs().argsort()  # the first, 0, belongs to the constant vector
    random_NN = torch.randn(q.n, q.n, generator=draws, dtype=torch.float64)
    random_NN[:, 0] = 1
    axes_NN = torch.linalg.qr(random_NN).Q
    hessian_NN = axes_NN * lambda_N[order] @ axes_NN.T
    slopes_N = (vectors_NN.T @ q.gradient_N)[order]
    return Surrogate(q.value, axes_NN @ slopes_N, (hessian_NN + hessian_NN.T) / 2, q.curvature)


def main() -> None:
    """Print a line for each surrogate and each K whose subsets are too many for the solver, but not for this script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=float, default=1e8, help="largest number of subsets to enumerate")
    parser.add_argument("--random", type=int, default=2, help="random surrogates similar to each real one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'surrogate':14} {'N':>3} {'K':>3} {'subsets':>11} {'best found':>10} {'of 8 found':>10} "
          f"{'worse by':>9} {'enumeration, s':>14} {'swaps, s':>9}")  # fmt: skip
    for seed, (name, n) in enumerate((name, n) for name, sizes in REAL.items() for n in sizes):
        with trained(name, n, seed, None) as mixture:
            real = mixture.losses.surrogate()
        for number in range(options.random + 1):
            q = similar(real, number) if number else real
            for k in range(1, n):
                if not subsets.ENUMERATED < math.comb(n, k) <= options.limit:
                    continue
                seconds: list[float] = []
                found: list[subsets.Subsets] = []
                for limit in (math.inf, 0):
                    start = time.perf_counter()
                    with patch.object(subsets, "ENUMERATED", limit):
                        found.append(subsets.best_subsets(q, k, COUNT))
                    seconds.append(time.perf_counter() - start)
                every, swaps = found
                worse = max((b - a) / abs(a) for a, b in zip(every.values, swaps.values, strict=True))
                print(f"{name if number == 0 else f'  similar {number}':14} {n:3} {k:3} {math.comb(n, k):11,} "
                      f"{'yes' if swaps.masks[0] == every.masks[0] else 'no':>10} "
                      f"{len({*swaps.masks} & {*every.masks}):10} {worse:9.1e} {seconds[0]:14.2f} {seconds[1]:9.2f}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
