"""Measure GPU speed, each figure beside its floor in the same run: python scripts/gpu/speed.py OUT [--device cuda]

Appends a JSON line for each figure to OUT/speed.jsonl as soon as it is measured. A floor is the best the hardware can
do: a copy of a large vector on the device, a copy from pinned memory, or the model's own passes. ``ratio`` is relative
to the floor; larger is better for bandwidths, smaller for times.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))

import model as gpt
import step as steps

from ckptavg.candidates import Candidates
from ckptavg.candidates.plan import free_memory
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture
from ckptavg.readers import StoredTensor

N: Final = 20
ROUNDS: Final = 5
SHARE: Final = 0.6  # share of the free memory that the largest matrix may take


class Made:
    """A candidate without a file: row ``i`` of a repeating block of random numbers, read at memory speed."""

    allow_nonfinite = False
    kept: frozenset[str] = frozenset()
    derived = None
    run = ""

    def __init__(self, model: nn.Module, i: int) -> None:
        self.step, self.path, self.name = i, f"step-{i}", f"step-{i}"
        self.tensors = {
            name: StoredTensor("BF16", tuple(tensor.shape), str(tensor.data_ptr()), 0)  # equal for tied tensors
            for name, tensor in model.state_dict().items()
        }
        draws = torch.Generator().manual_seed(i)
        values = 0.02 * torch.randn((1 << 22) + 4096, generator=draws)
        self._bytes = memoryview(values.to(torch.bfloat16).view(torch.uint8).numpy())

    def spec(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        for begin in range(0, len(out), len(self._bytes)):
            part = out[begin : begin + len(self._bytes)]
            part[:] = self._bytes[: len(part)]

    def check_unchanged(self) -> None:
        pass


class Vector(nn.Module):
    """A model of one parameter."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device=device))


class Figures:
    """Writer of figures, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(
        self, what: str, value: float | None, unit: str, *, floor: float | None = None, goal: str = "", **also: Any
    ) -> None:
        """Add a figure; ``goal`` is a comparison with the ratio, such as ``>= 0.8``; a missing value is a failure."""
        ratio = None if value is None or floor is None else value / floor
        line = {"what": what, "value": value, "unit": unit, "floor": floor, "ratio": ratio, "goal": goal, **also}
        with self._path.open("a") as file:
            print(json.dumps(line), file=file)
        print(
            ", ".join(f"{name} {of:.4g}" if isinstance(of, float) else f"{of}" for name, of in line.items()), flush=True
        )


def seconds(work: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Return the minimum of several rounds, after a warm-up round."""
    times: list[float] = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ignore(*_: object, **__: object) -> None:
    """Discard progress."""


def candidates(size: int, device: torch.device, n: int = N, **options: Any) -> Candidates:
    model = Vector(size, device)
    return Candidates(model, [Made(model, i) for i in range(n)], ignore, **options)  # pyright: ignore


def fitting(elements: int, device: torch.device, bytes_each: float) -> int:
    """Return ``elements``, or fewer if they would exceed ``SHARE`` of the free memory."""
    return int(min(elements, SHARE * free_memory(device) / bytes_each))


def copied(size: int, device: torch.device, source: torch.device) -> float:
    """Return the bytes per second that a copy reads and writes, or moves over the bus if ``source`` is on the host."""
    there = torch.empty(size, dtype=torch.uint8, device=device)
    pinned = source.type == "cpu" and device.type == "cuda"
    here = torch.ones(size, dtype=torch.uint8, device=source, pin_memory=pinned)
    took = seconds(lambda: there.copy_(here, non_blocking=True), device)
    return (size if pinned else 2 * size) / took


def products(figures: Figures, size: int, device: torch.device, few: int) -> None:
    """Measure both products with the matrix beside the copy of a vector: in bfloat16, then at low bit widths."""
    floor = copied(fitting(4 * size, device, 2), device, device)
    figures.add("copy on the device", floor / 1e9, "GB/s")
    of_matrix(figures, "bfloat16", fitting(size, device, 2 * (N + 3)), device, floor, ">= 0.8")
    for bits, goal in ((8, ""), (4, ">= 0.4")):
        release(device)
        elements = fitting(few, device, N * (bits / 8 + 0.07) + 12)
        of_matrix(figures, f"{bits} bits", elements, device, floor, goal, bits=bits)


def of_matrix(
    figures: Figures, kind: str, size: int, device: torch.device, floor: float, goal: str, **options: Any
) -> None:
    rows = candidates(size, device, **options)
    c_N = torch.full((N,), 1 / N, device=device, dtype=torch.float64)
    rows.model.w.grad.normal_()  # pyright: ignore
    moved = rows.nbytes + size * (2 if rows.exact else 6)  # plus the vector, and the mean in float32
    for what, work in (("materialize", lambda: rows.materialize(c_N)), ("pullback", rows.pullback)):
        rate = moved / seconds(work, device)
        figures.add(f"{what}, {kind}", rate / 1e9, "GB/s", floor=floor / 1e9, goal=goal, n=N, elements=size)


def offloaded(figures: Figures, size: int, device: torch.device) -> None:
    """Measure rows in host memory beside the bus, and a mean that changes by one row beside its passes."""
    floor = copied(2 * size, device, torch.device("cpu"))
    figures.add("copy from the host", floor / 1e9, "GB/s")
    offload = "cpu" if device.type != "cpu" else "disk"
    rows = candidates(size, device, offload=offload)
    c_N = torch.full((N,), 1 / N, device=device, dtype=torch.float64)
    whole = seconds(lambda: rows.materialize(c_N), device, 2)
    figures.add(
        f"materialize, --offload {offload}", N * size * 2 / whole / 1e9, "GB/s", floor=floor / 1e9, n=N, elements=size
    )
    subsets = [[*range(10)], [*range(1, 11)]]

    def moved() -> None:
        rows.average(subsets[0])
        subsets.reverse()

    moved()
    difference = seconds(moved, device, 2)
    figures.add("a mixture by its difference of two rows", 1000 * difference, "ms", floor=1000 * whole, elements=size)


class Task(steps.Task):
    """`step.Task` on the transformer of ``model.py``."""

    def __init__(self, tokens: Tensor, size: str) -> None:
        super().__init__(tokens)
        self._size = size

    def model(self) -> nn.Module:
        return gpt.network(self._size)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return gpt.loss(model, batch)


def searches(figures: Figures, size: str, tokens: tuple[int, int], device: torch.device) -> None:
    """Measure a step of SeWA and TWA beside one of plain SGD on the same model and batch."""
    now = steps.clock_of(device)
    batch = torch.randint(gpt.SIZES[size].vocabulary, tokens, device=device)
    model = gpt.network(size).to(device).eval()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)

    def plain() -> None:
        sgd.zero_grad(set_to_none=False)
        gpt.loss(model, batch).backward()
        sgd.step()

    mixture = Mixture(Task(batch, size), [Made(model, i) for i in range(N)], Run(device=device))
    mixture.prepare()
    works = {
        "plain SGD": lambda: steps.of_steps(plain, now),
        "twa": lambda: steps.of_strategy(steps.TWA(), mixture, now),
        "sewa --samples 1": lambda: steps.of_strategy(steps.SeWA(k=5, samples=1), mixture, now),
    }
    times: Mapping[str, list[Any]] = {what: [] for what in works}
    for _ in range(3):
        for what, work in works.items():
            times[what] += work()
    unit = 1000 * steps.least(times["plain SGD"]).clock
    elements = sum(w.numel() for w in model.parameters())
    also = {"n": N, "elements": elements, "tokens": tokens[0] * tokens[1]}
    figures.add("a step of plain SGD", unit, "ms", **also)
    for what in ("twa", "sewa --samples 1"):
        value = 1000 * steps.least(times[what]).clock
        figures.add(f"a step of {what}", value, "ms", floor=unit, goal="<= 1.1", **also)


def whole(figures: Figures, size: str, out: Path, device: torch.device) -> None:
    """Measure two searches on files, as a user runs them, beside reading the files once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ckpts"
        folder.mkdir()
        model = gpt.network(size)
        state = {name: tensor.detach().to(device) for name, tensor in model.named_parameters()}  # tied tensors once
        draws = torch.Generator(device).manual_seed(0)
        for i in range(N):
            near = {
                name: (w + 0.002 * torch.randn(w.shape, generator=draws, device=device)).to(w.dtype).cpu()
                for name, w in state.items()
            }
            save_file(near, folder / f"step-{i}.safetensors")
        total = sum(file.stat().st_size for file in folder.iterdir())
        start = time.perf_counter()
        buffer = bytearray(8 << 20)
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        read = time.perf_counter() - start
        commands = {
            "the whole of ckptavg sewa --k 5": ["sewa", str(folder), "--k", "5"],
            "the whole of ckptavg twa --solver quadratic": ["twa", str(folder), "--solver", "quadratic"],
        }
        task = ["--task", f"{Path(__file__).with_name('model.py')}", "--device", str(device)]
        (out / "whole.log").unlink(missing_ok=True)
        for what, words in commands.items():
            start = time.perf_counter()
            with (out / "whole.log").open("a") as log:
                done = subprocess.run(
                    [sys.executable, "-m", "ckptavg", *words, *task, "-o", f"{name}/{words[0]}"],
                    stdout=log, stderr=log, cwd=Path(__file__).parents[2], env=gpt.environment(size), check=False,
                )  # fmt: skip
            took = time.perf_counter() - start
            if done.returncode:
                said = (out / "whole.log").read_text().splitlines()
                error = next((line for line in reversed(said) if line.startswith("error: ")), said[-1])
                raise RuntimeError(f"{what} ended with {done.returncode}: {error[:200]}")
            figures.add(what, took, "s", floor=read, n=N, bytes=total)


SIZES: Final = {
    "cuda": SimpleNamespace(vector=10**9, few=4 * 10**8, host=10**8, model="medium", tokens=(16, 1024)),
    "cpu": SimpleNamespace(vector=10**5, few=10**5, host=10**4, model="tiny", tokens=(2, 32)),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    sizes = SIZES[device.type]
    torch.manual_seed(0)
    figures = Figures(options.out / "speed.jsonl")
    parts: Mapping[str, Callable[[], None]] = {
        "steps": lambda: searches(figures, sizes.model, sizes.tokens, device),
        "products": lambda: products(figures, sizes.vector, device, sizes.few),
        "offload": lambda: offloaded(figures, sizes.host, device),
        "whole": lambda: whole(figures, sizes.model, options.out, device),
    }
    failed = False
    for what, part in parts.items():
        try:
            part()
        except Exception as error:  # continue with the other parts: the machine is available for minutes only
            failed = True
            figures.add(what, None, "", failure=f"{type(error).__name__}: {error}")
        release(device)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
