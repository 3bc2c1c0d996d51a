"""Cost and memory of the search at each bit width: python scripts/benchmark/lowbit.py

N candidates of D float32 parameters. A step is materialize and pullback: the cost that a search adds to forward and
backward. The reference is the step of the TWA authors' low-bit matrix, written from its formula (arXiv:2205.13104v3):
one byte per code at any bit width, one scale and zero point for the matrix, and an [N, D] matrix of floats expanded
from it in either direction. Prints milliseconds, the ratio to the reference, bytes per element and candidate, and the
rounding error.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ckptavg.candidates import Candidates
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import discover

BITS = (32, 16, 8, 4, 2, 1)


class Vector(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))


class Authors:
    """w = w̄ + s·Qᵀx + z·Σx and ∂ℓ/∂x = s·Q g + z·Σg, with all of Q expanded to floats."""

    def __init__(self, p_ND: Tensor) -> None:
        self.centre_D = p_ND.mean(dim=0)
        p_ND = p_ND - self.centre_D
        self.zero, top = p_ND.min(), p_ND.max()
        self.scale = (top - self.zero) / 15
        self.codes_ND = ((p_ND - self.zero) / self.scale).round().to(torch.uint8)

    def step(self, x_N: Tensor, g_D: Tensor) -> tuple[Tensor, Tensor]:
        w_D = self.centre_D + self.codes_ND.float().t() @ (self.scale * x_N) + self.zero * x_N.sum()
        return w_D, self.codes_ND.float() @ (self.scale * g_D) + self.zero * g_D.sum()


def of_authors(authors: Authors, c_N: Tensor, g_D: Tensor, rounds: int) -> tuple[float, float]:
    """Return milliseconds per step and bytes per element."""
    took = milliseconds(lambda: authors.step(c_N, g_D), rounds, g_D.device)
    return took, authors.codes_ND.nbytes / (len(c_N) * len(g_D))


def milliseconds(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    times: list[float] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    n, size = options.candidates, options.parameters
    p_ND = 0.01 * torch.randn(n, size, generator=torch.Generator().manual_seed(0))
    c_N = torch.full((n,), 1 / n, device=device)
    g_D = torch.randn(size, device=device)
    reference, held = of_authors(Authors(p_ND.to(device)), c_N, g_D, options.rounds)
    print(f"{torch.get_num_threads()} threads, {device}; N = {n}, D = {size:,}")
    print("                 materialize  pullback   step ms  of authors'  bytes/element  with mean  rounding lost")
    print(f"authors' 4 bits  {'':11}  {'':8}  {reference:8.0f}  {1:10.2f}  {held:13.3f}")
    with tempfile.TemporaryDirectory() as folder:
        for step, row_D in enumerate(p_ND):
            save_file({"w": row_D.clone()}, Path(folder) / f"step-{step}.safetensors")
        with discover([Path(folder)]) as found:
            show(found.checkpoints, c_N, g_D, reference, options.rounds)


def show(checkpoints: Sequence[Checkpoint], c_N: Tensor, g_D: Tensor, reference: float, rounds: int) -> None:
    n, size, device = len(c_N), len(g_D), g_D.device
    for bits in BITS:
        mixed = Candidates(Vector(size).to(device), checkpoints, lambda *_: None, bits=bits)
        mixed.model.w.grad.copy_(g_D)  # pyright: ignore
        there = milliseconds(lambda mixed=mixed: mixed.materialize(c_N), rounds, device)
        back = milliseconds(mixed.pullback, rounds, device)
        element = mixed.nbytes / (n * size)
        mean = 0 if bits == 32 else 4 / n
        print(
            f"{bits:7} bits     {there:11.0f}  {back:8.0f}  {there + back:8.0f}  {(there + back) / reference:10.2f}  "
            f"{element:13.4f}  {element + mean:9.4f}  {mixed.error:13.4f}"
        )


if __name__ == "__main__":
    main()
