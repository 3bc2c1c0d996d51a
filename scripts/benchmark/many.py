"""Cost of learning from 10 to 300 candidates: python scripts/benchmark/many.py

N checkpoints of a model of D float32 elements are written; the model looks up 64 rows of its D/64, so that its own
passes hardly count. Each pair (N, D) with at most ``--largest`` elements in all is measured in a process of its own:

- loading: all files into the candidate matrix, from the page cache;
- anew: the mixture of all N with a coefficient each;
- difference: the mean of all but one candidate, after that of all but another; of 5 candidates where N is at most 33;
- sewa, twa: a step of the search, with one sample, besides the journal;
- whole: ``ckptavg sewa`` with ``--steps`` steps, with Python's start, to the end of the process; its peak of memory
  and, beside it, the figure that it prints in its first seconds.

The exponents below are those of the fit log t = a + n·log N + d·log D over the pairs whose matrix is larger than the
cache: 1 is linear. CPU seconds are the more stable figure on a shared machine.
"""

import argparse
import json
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from step import Task, Used, clock_of, least, of_strategy  # first: it sets torch's wait policy

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

import ckptavg
from ckptavg.checkpoints.discover import discover
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture
from ckptavg.options.search import SearchOptions
from ckptavg.strategies.sewa import SeWA
from ckptavg.strategies.twa import TWA

WIDTH, TABLES = 64, 8
CACHE = 64 << 20  # bytes, the largest matrix that may stay in a cache
OVERLAP = 4096  # elements by which the noise of candidates is shifted against each other
FIGURES = ("loading", "anew", "difference", "sewa step", "twa step", "whole")


class Tables(nn.Module):
    """Sum of one row of each table, and a linear output: the forward pass does not grow with D."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, WIDTH, _weight=torch.zeros(rows, WIDTH)) for _ in range(TABLES))
        self.head = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, at_B: Tensor) -> Tensor:
        return self.head(sum(table(at_B) for table in self.tables)).squeeze(1)


def rows_of(elements: int) -> int:
    return max(WIDTH, elements // WIDTH // TABLES)


def batch_of(elements: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(rows_of(elements), (64,), generator=draws), torch.randn(64, generator=draws)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square()


class Lookup(Task):
    """A task that repeats one batch of 64 examples."""

    source = "many.py"

    def __init__(self, elements: int) -> None:
        super().__init__(torch.zeros(64))
        self._elements = elements

    def model(self) -> nn.Module:
        return Tables(rows_of(self._elements))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch)

    def batches(self, split: str) -> Any:
        return iter([batch_of(self._elements)])


def write(folder: Path, n: int, elements: int) -> None:
    """Write candidates that are one base plus the same noise, shifted; quicker than a draw for each."""
    shapes = {name: list(weight.shape) for name, weight in Tables(rows_of(elements)).state_dict().items()}
    header, size = dict[str, Any](), 0
    for name, shape in shapes.items():
        start, size = size, size + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, size]}
    head, draws = json.dumps(header).encode(), np.random.default_rng(0)
    head += b" " * (-len(head) % 8)
    base, noise = (draws.standard_normal(size // 4 + OVERLAP, dtype=np.float32) for _ in range(2))
    for i, shift in enumerate(draws.permutation(OVERLAP)[:n]):
        values = base[: size // 4] + np.float32(0.3) * noise[shift:][: size // 4]
        (folder / f"step-{i}.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + values.tobytes())


def parts(folder: Path, options: argparse.Namespace) -> Mapping[str, Used]:
    """Measure all but the whole run."""
    (elements,), now = options.elements, clock_of(torch.device("cpu"))
    with discover([folder]) as found:
        search = SearchOptions(bits=options.bits, offload=options.offload)
        mixture = Mixture(Lookup(elements), found.checkpoints, Run(device=torch.device("cpu")), search)
        before = now()
        mixture.prepare()
        used = {"loading": now().since(before)}
        candidates, n = mixture.mixed.candidates, mixture.n
        size = n - 1 if n > 33 else min(5, n - 1)
        dense_N = torch.full((n,), 1 / n, dtype=torch.float64)

        def swapped(out: int) -> None:
            chosen = [i for i in range(size + 1) if i != out]
            if not candidates.average(chosen):
                candidates.materialize(dense_N.new_zeros(n).index_fill(0, torch.tensor(chosen), 1 / size))

        used["anew"] = repeated(lambda _: candidates.materialize(dense_N), now, options.rounds)
        used["difference"] = repeated(swapped, now, options.rounds)
        for name, strategy in (("sewa step", SeWA(k=5, samples=1)), ("twa step", TWA())):
            used[name] = least(of_strategy(strategy, mixture, now, options.rounds))
    return used


def repeated(work: Callable[[int], object], now: Callable[[], Used], rounds: int) -> Used:
    """Return the least time of calls with 1, 2, …; the call with 0 warms up."""
    used: list[Used] = []
    for number in range(rounds + 1):
        before = now()
        work(number)
        used.append(now().since(before))
    return least(used[1:])


def whole(folder: Path, options: argparse.Namespace) -> None:
    """Run ``ckptavg sewa`` on objects, and print what it says of its memory."""

    def watch(stage: str, done: int, total: int, figures: Mapping[str, Any]) -> None:
        if stage.startswith("memory: "):
            print(stage)

    (elements,) = options.elements
    ckptavg.sewa(  # pyright: ignore[reportAttributeAccessIssue]
        folder, k=5, steps=options.steps, model=lambda: Tables(rows_of(elements)), loss=loss_of,
        val=[batch_of(elements)], output=folder / "out" / "averaged.safetensors", bits=options.bits,
        offload=options.offload, watch=watch,
    )  # fmt: skip


def measure(n: int, elements: int, options: argparse.Namespace) -> tuple[dict[str, Used], int, int]:
    """Return the figures of one pair, the peak of the whole run in bytes, and the bytes that it announced."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write(folder, n, elements)
        (folder / "out").mkdir()
        more = [f"--{key}={getattr(options, key)}" for key in ("rounds", "threads", "steps", "bits", "offload")]
        command = [sys.executable, __file__, "--elements", str(elements), *more, "--inside", str(folder)]
        output = subprocess.run([*command, "--parts"], capture_output=True, text=True, check=True).stdout
        used = {key: Used(*value) for key, value in json.loads(output).items()}
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            said = process.stdout.read() if process.stdout else ""
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        used["whole"] = Used(time.perf_counter() - start, usage.ru_utime + usage.ru_stime)
    return used, 1024 * usage.ru_maxrss, said_bytes(said)


def said_bytes(line: str) -> int:
    """Return the total of a plan's line: what is needed, and what a running sum takes at most."""
    sizes = re.findall(r"(?:= |at most )([\d.,]+) ([kMG])B", line)
    return round(sum(float(size.replace(",", "")) * {"k": 1e3, "M": 1e6, "G": 1e9}[unit] for size, unit in sizes))


def exponents(sizes: Sequence[tuple[int, int]], seconds: Sequence[float]) -> tuple[float, float]:
    """Return n and d of the least-squares fit log t = a + n·log N + d·log D."""
    logs = np.log(np.array(sizes, dtype=float))
    fit, *_ = np.linalg.lstsq(np.column_stack([np.ones(len(sizes)), logs]), np.log(np.maximum(seconds, 1e-6)))
    return float(fit[1]), float(fit[2])


def show(table: Mapping[tuple[int, int], tuple[dict[str, Used], int, int]], options: argparse.Namespace) -> None:
    large = [size for size in table if 4 * size[0] * size[1] > CACHE]
    if len({n for n, _ in large}) > 1 and len({d for _, d in large}) > 1:
        print("exponents of N and D in CPU seconds, of the matrices that fit no cache:")
        for what in FIGURES:
            n, d = exponents(large, [table[size][0][what].processor for size in large])
            print(f"  {what:12}  {n:5.2f}  {d:5.2f}")
    over = max((peak - said for _, peak, said in table.values()), default=0)
    print(f"the peak was above what was said, which is without Python and torch, by at most {over / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--elements", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--largest", type=float, default=3e8, help="most elements of all candidates together")
    parser.add_argument("--steps", type=int, default=20, help="of the whole run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--offload", default="none", choices=("none", "disk"))
    parser.add_argument("--folder", type=Path, help="directory for the checkpoints; default the system's temporary one")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.inside:
        if options.parts:
            print(json.dumps(parts(options.inside, options)))
        else:
            whole(options.inside, options)
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, {options.threads} threads; load {os.getloadavg()[0]:.1f}")
    storage = {"disk": "in their files"}.get(options.offload, f"at {options.bits} bits")
    print(f"candidates {storage}; the whole run has {options.steps} steps; CPU milliseconds, and CPU seconds (wall)")
    print("   N          D " + "".join(f"{what:>11}" for what in FIGURES[:-1]) + "          whole     peak     said")
    table: dict[tuple[int, int], tuple[dict[str, Used], int, int]] = {}
    for elements in options.elements:
        for n in options.candidates:
            if n * elements > options.largest:
                continue
            used, peak, said = table[n, elements] = measure(n, elements, options)
            row = "".join(f"{1000 * used[what].processor:11.1f}" for what in FIGURES[:-1])
            run = f"{used['whole'].processor:.1f} ({used['whole'].clock:.1f})"
            print(f"{n:4} {elements:10,} {row} {run:>14} {peak / 1e9:5.2f} GB {said / 1e9:5.2f} GB", flush=True)
    show(table, options)


if __name__ == "__main__":
    main()
