"""Compare several workers with one, by the real torchrun with gloo on this machine: python scripts/benchmark/scaling.py

Four tables, each figure beside the value that docs/scaling.md predicts: the bytes that a worker sends per step (counted
by the kernel over all connections of the process), the time of scores, the time of an average, and the memory of a
search with and without --shard. One thread per worker. The file is its own task file, a stack of linear layers. Times
are the minimum of two; a busy machine affects them, not the bytes. glibc is set to return freed memory at once;
otherwise it retains about the size of a gathered model.
"""

import argparse
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import target
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ckptavg.api import run
from ckptavg.checkpoints.discover import discover
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture
from ckptavg.options.search import SearchOptions
from ckptavg.runtime.workers import Workers, joined
from ckptavg.strategies import from_spec
from ckptavg.tasks.python_file import PythonTask

CPU = torch.device("cpu")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
BYTES_SENT = 200  # offsets in the kernel's tcp_info
WIDTH, DEPTH = int(os.environ.get("SCALING_WIDTH", "1")), int(os.environ.get("SCALING_DEPTH", "1"))


def model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return model(batch[0]).square().mean(dim=1)


def val_dataloader() -> DataLoader:
    count = int(os.environ.get("SCALING_EXAMPLES", "64"))
    return DataLoader(TensorDataset(torch.ones(count, WIDTH)), batch_size=32)


class Size(NamedTuple):
    """N candidates of ``depth`` square matrices."""

    n: int
    width: int
    depth: int

    @property
    def parameters(self) -> int:
        return self.depth * self.width**2

    def place(self, folder: Path) -> Path:
        """Return a directory of the candidates; create it if it does not exist."""
        place = folder / "x".join(map(str, self))
        if not place.exists():
            place.mkdir()
            draws = torch.Generator().manual_seed(0)
            first = [torch.randn(self.width, self.width, generator=draws) / self.width**0.5 for _ in range(self.depth)]
            for step in range(1, self.n + 1):
                state = {f"{i}.weight": tensor * (1 + 0.01 * step) for i, tensor in enumerate(first)}
                save_file(state, place / f"step-{step}.safetensors")
        return place


@contextmanager
def mixture(folder: Path, workers: Workers, **options: Any) -> Iterator[Mixture]:
    """Open the real objective on the candidates in a directory made by `Size.place`."""
    _, os.environ["SCALING_WIDTH"], os.environ["SCALING_DEPTH"] = folder.name.split("x")
    with discover([folder]) as found:
        task = PythonTask(__file__)  # reads the environment variables
        yield Mixture(task, found.checkpoints, Run(device=CPU, workers=workers), SearchOptions(**options))


def traffic(folder: Path, workers: Workers, steps: int = 20) -> dict[str, float]:
    """Return the bytes that this worker sends per step of a search."""
    with mixture(folder, workers) as mixed:
        mixed.losses.loss(mixed.losses.uniform())
        workers.gather(None)
        before = _sent()
        for _ in range(steps):
            mixed.losses.loss(mixed.losses.uniform())
        return {"bytes": (_sent() - before) / steps}


def memory(folder: Path, workers: Workers, *, shard: bool) -> dict[str, float]:
    """Return the peak memory of a search in bytes, above the program's own."""
    with (
        tempfile.TemporaryDirectory() as place,
        mixture(Size(2, 4, 2).place(Path(place)), workers, shard=shard) as mixed,
    ):
        from_spec("sewa:k=1:steps=1").learn(mixed)  # loads the modules that are imported on first use
    gc.collect()  # of what was measured before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    with mixture(folder, workers, shard=shard) as mixed:
        from_spec("sewa:k=2:steps=2").learn(mixed)
        return {"bytes": _status("VmHWM") - before}


def scores(folder: Path, workers: Workers, parallel: Any) -> dict[str, float]:
    """Return the seconds it takes to score all candidates."""
    with mixture(folder, workers, parallel=parallel) as mixed:
        mixed.prepare()
        workers.gather(None)
        start = time.perf_counter()
        from_spec("best").learn(mixed)
        return {"seconds": time.perf_counter() - start}


def average(folder: Path, workers: Workers) -> dict[str, float]:
    """Return the seconds it takes to write, hash and flush the mean of all candidates."""
    with tempfile.TemporaryDirectory() as place:
        workers.gather(None)
        start = time.perf_counter()
        run(folder, from_spec("swa"), output=workers.broadcast(Path(place)) / "out", workers=workers)
        workers.gather(None)
        return {"seconds": time.perf_counter() - start}


PARTS: dict[str, Callable[[Path, Workers], dict[str, float]]] = {
    "traffic": traffic,
    "whole": lambda folder, workers: memory(folder, workers, shard=False),
    "shard": lambda folder, workers: memory(folder, workers, shard=True),
    "batches": lambda folder, workers: scores(folder, workers, "batches"),
    "candidates": lambda folder, workers: scores(folder, workers, "candidates"),
    "average": average,
}


def measured(world: int, *parts: tuple[str, Path], examples: int = 64) -> list[list[dict[str, float]]]:
    """Run each part on each directory with that many workers; return the results of each."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    words = [f"{part}:{folder}" for part, folder in parts]
    done = subprocess.run(
        [torchrun, "--standalone", f"--nproc-per-node={world}", __file__, "--measure", *words],
        env={**os.environ, **ENVIRONMENT, "SCALING_EXAMPLES": str(examples)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="directory for the candidates; default a temporary one")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs")
    options = parser.parse_args()
    if options.measure is None:
        with tempfile.TemporaryDirectory() as place:
            report(options.folder or Path(place), quick=options.quick)
        return
    torch.set_num_threads(1)
    with joined("cpu", 600.0) as workers:
        asked = [word.partition(":") for word in options.measure]
        found = [workers.gather(PARTS[part](Path(folder), workers)) for part, _, folder in asked]
    if workers.is_rank_zero:
        print(json.dumps(found))


def report(folder: Path, *, quick: bool) -> None:
    print("gloo on loopback, 1 thread a worker")
    print("\nbytes that each of two workers sends in a step, and the 8·(N + 2) that the numbers take")
    sizes = [Size(n, width, 4) for n in (4, 20, 80) for width in (16, 256)]
    for size, found in zip(sizes, measured(2, *(("traffic", size.place(folder)) for size in sizes)), strict=True):
        print(f"  N = {size.n:2}  D = {size.parameters:7,}  {found[0]['bytes']:6,.0f}  {8 * (size.n + 2):4}")
    size = Size(4, 256, 8) if quick else Size(8, 1024, 8)
    times(size, folder, ("batches", "candidates"), examples=1024 if quick else 4096)
    times(size, folder, ("average",))
    size = Size(4, 256, 16) if quick else Size(8, 1024, 16)
    print(f"\nmemory of a search at its peak, in D floats: N = {size.n}, D = {size.parameters:,}")
    place, unit = size.place(folder), 4 * size.parameters
    whole, part = (max(one["bytes"] for one in measured(2, (kind, place))[0]) / unit for kind in ("whole", "shard"))
    print(f"  a worker alone  {whole:6.2f}   N + 2 are {size.n + 2}")
    print(f"  with --shard    {part:6.2f}   (N + 2)/2 + 3/16 are {(size.n + 2) / 2 + 3 / 16:.2f}")
    target("memory of a worker with `--shard`, two workers, relative to one without", part / whole, 0.6, "×")


def times(size: Size, folder: Path, parts: Sequence[str], examples: int = 64) -> None:
    print(
        f"\nseconds of one process and of two, N = {size.n}, D = {size.parameters:,}: how many times as fast, at most 2"
    )
    for part in parts:
        one, two = (
            min(found[0]["seconds"] for found in measured(world, *2 * [(part, size.place(folder))], examples=examples))
            for world in (1, 2)
        )
        print(f"  {part:10}  {one:7.2f}  {two:7.2f}  {one / two:5.2f}")


def _sent() -> int:
    """Return the bytes that this process has sent by TCP."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                known = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", known, BYTES_SENT)[0]
    return total


def _status(field: str) -> int:
    """Return a field of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
