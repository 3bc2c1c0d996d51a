"""Compare a step of TWA and of SeWA with a plain SGD step on the same model and batch: python scripts/benchmark/step.py

N checkpoints of a 10-million-parameter transformer are written; a batch has 4,096 tokens. `twa` and `sewa` run as they
do for a user, on the real objective; a step is the time between two calls of `progress`, on one batch (SeWA with one
sample). Beside them are the steps of the TWA authors' two public codes, written from their formulas (arXiv:2205.13104,
ICLR 2023 and the journal version). Rounds are interleaved; the minimum of each figure is printed, with its ratio to
plain SGD. Then the breakdown of a TWA step. CPU seconds are the more stable figure on a shared machine; waiting threads
sleep, so that waiting is not counted as work.
"""

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
import torch
from processes import target
from safetensors.torch import save_file
from torch import Tensor, nn

from ckptavg import tasks
from ckptavg.checkpoints.discover import discover
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture
from ckptavg.options.search import SearchOptions
from ckptavg.score import Split
from ckptavg.strategies.sewa import SeWA
from ckptavg.strategies.solvers.concrete_mask import LEARNING
from ckptavg.strategies.solvers.subspace import TRAINING
from ckptavg.strategies.twa import TWA

VOCABULARY, STEPS = 1000, 2


class Used(NamedTuple):
    """Wall-clock and CPU seconds since an arbitrary start."""

    clock: float
    processor: float

    def since(self, before: "Used") -> "Used":
        return Used(self.clock - before.clock, self.processor - before.processor)


Clock = Callable[[], Used]


def network() -> nn.Module:
    layer = nn.TransformerEncoderLayer(384, 6, 1152, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(VOCABULARY, 384), encoder, nn.Linear(384, VOCABULARY))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


class Task(tasks.Task):
    """A task that repeats one batch: a plain object with the attributes of `ckptavg.tasks.Task`."""

    source, metric, metric_goal, metric_bounds, corpus, whole = "step.py", None, "max", None, None, None
    metric_key, predict = None, None

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def model(self) -> nn.Module:
        return network()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch)

    def has(self, split: Split) -> bool:
        return split == "val"

    def batches(self, split: Split) -> Iterator[Tensor]:
        return iter([self._tokens])

    def examples(self, split: Split) -> int:
        return len(self._tokens)

    def length(self, split: Split) -> int:
        return 1

    def halve(self) -> bool:
        return False


def clock_of(device: torch.device) -> Clock:
    def now() -> Used:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return Used(time.perf_counter(), time.process_time())

    return now


def least(used: list[Used]) -> Used:
    return Used(*map(min, zip(*used, strict=True)))


class Enough(Exception):
    """Ends a search after the steps that are measured, before it scores anything."""


def of_strategy(strategy: TWA | SeWA, mixture: Mixture, now: Clock, steps: int = STEPS) -> list[Used]:
    """Return the time of each step except the first, which warms up."""
    stamps: list[Used] = []

    def stamp(stage: str, *_: object, **__: object) -> None:
        if stage in (TRAINING, LEARNING):
            stamps.append(now())
        if len(stamps) > steps:
            raise Enough

    tell, mixture.progress = mixture.progress, stamp  # pyright: ignore
    mixture.restart()
    with contextlib.suppress(Enough):
        strategy.learn(mixture)
    mixture.progress = tell
    return [after.since(before) for before, after in pairwise(stamps)]


def of_steps(step: Callable[[], object], now: Clock) -> list[Used]:
    stamps: list[Used] = []
    for _ in range(STEPS + 1):
        step()
        stamps.append(now())
    return [after.since(before) for before, after in pairwise(stamps)]


class Authors:
    """g ← Pᵀ(P g) in all D parameters, then SGD with momentum on them: the code of ICLR 2023."""

    def __init__(self, rows_ND: Tensor, model: nn.Module, tokens: Tensor) -> None:
        self._p_ND = rows_ND.clone()
        for i, row_D in enumerate(self._p_ND):  # Gram-Schmidt, in place on the weights
            row_D -= self._p_ND[:i].t() @ (self._p_ND[:i] @ row_D)
            row_D /= row_D.norm()
        self._model, self._tokens = model, tokens
        self._sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(self) -> None:
        self._sgd.zero_grad()
        loss_of(self._model, self._tokens).backward()
        weights = list(self._model.parameters())
        g_D = torch.cat([w.grad.flatten() for w in weights])  # pyright: ignore
        g_D = self._p_ND.t() @ (self._p_ND @ g_D)
        for w, part in zip(weights, g_D.split([w.numel() for w in weights]), strict=True):
            w.grad.copy_(part.view_as(w))  # pyright: ignore
        self._sgd.step()


class AuthorsJournal:
    """∂ℓ/∂x = Q(s g) + z Σg for each tensor, w = w̄ + Qᵀ(s x) + z Σx, Q in bytes: the journal version, 4 bits."""

    def __init__(self, rows_ND: Tensor, model: nn.Module, tokens: Tensor) -> None:
        self._model, self._tokens = model, tokens
        self._weights = list(model.parameters())
        self._centre = [part.clone() for part in rows_ND.mean(dim=0).split([w.numel() for w in self._weights])]
        parts = rows_ND.split([w.numel() for w in self._weights], dim=1)
        self._blocks: list[tuple[Tensor, Tensor, Tensor]] = []
        for part_ND, centre in zip(parts, self._centre, strict=True):
            p_ND = nn.functional.normalize(part_ND - centre, dim=1)
            low, high = p_ND.aminmax()
            scale = (high - low) / 15
            self._blocks.append((((p_ND - low) / scale).round().to(torch.uint8), scale, low))
        self._x_NG = torch.zeros(len(rows_ND), len(self._blocks), device=rows_ND.device, requires_grad=True)
        self._x_NG.grad = torch.zeros_like(self._x_NG)
        self._adamw = torch.optim.AdamW([self._x_NG], lr=1e-3, weight_decay=0.0)

    @torch.no_grad()
    def step(self) -> None:
        self._model.zero_grad()
        with torch.enable_grad():
            loss_of(self._model, self._tokens).backward()
        for k, (w, (q_ND, scale, low)) in enumerate(zip(self._weights, self._blocks, strict=True)):
            g = w.grad.flatten()  # pyright: ignore
            self._x_NG.grad[:, k] = q_ND.float() @ (scale * g) + low * g.sum()  # pyright: ignore
        self._adamw.step()
        for k, (w, centre, (q_ND, scale, low)) in enumerate(
            zip(self._weights, self._centre, self._blocks, strict=True)
        ):
            x_N = self._x_NG[:, k]
            w.copy_((centre + q_ND.float().t() @ (scale * x_N) + low * x_N.sum()).view_as(w))


def parts_of_a_step(mixture: Mixture, now: Clock, rounds: int) -> Mapping[str, Used]:
    """Return the minimum time of each part, timed around it."""
    found: dict[str, list[Used]] = {}
    candidates, task = mixture.mixed.candidates, mixture.task
    real = candidates.materialize, task.loss, candidates.pullback
    stamps: list[Used] = []

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            stamps.append(now())
            result = work(*given, **named)
            stamps.append(now())
            return result

        return run

    candidates.materialize, task.loss, candidates.pullback = map(timed, real)  # pyright: ignore
    for _ in range(rounds):
        (whole,) = of_strategy(TWA(), mixture, now, 1)
        begin, mixed, forward, looked, back, end = stamps[-6:]
        spans = {"materialize": (begin, mixed), "forward": (forward, looked), "backward": (looked, back),
                 "pullback": (back, end)}  # fmt: skip
        for name, (before, after) in spans.items():
            found.setdefault(name, []).append(after.since(before))
        rest = Used(*(a - b for a, b in zip(whole, end.since(begin), strict=True)))
        found.setdefault("everything else", []).append(rest)
    candidates.materialize, task.loss, candidates.pullback = real  # pyright: ignore
    return {name: least(used) for name, used in found.items()}


def write(folder: Path, n: int) -> None:
    torch.manual_seed(0)
    state = network().state_dict()
    for step in range(n):
        draws = torch.Generator().manual_seed(step)
        near = {name: w + 0.01 * torch.randn(w.shape, generator=draws) for name, w in state.items()}
        save_file(near, folder / f"step-{step}.safetensors")


def contenders(mixture: Mixture, tokens: Tensor, now: Clock) -> Mapping[str, Callable[[], list[Used]]]:
    """Return name → a function that runs a few of its steps."""
    device = tokens.device
    model, its, others = (network().to(device) for _ in range(3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)

    def plain() -> None:
        sgd.zero_grad()
        loss_of(model, tokens).backward()
        sgd.step()

    size = sum(w.numel() for w in model.parameters())
    draws = torch.Generator(device).manual_seed(0)
    rows_ND = 0.02 * torch.randn(mixture.n, size, generator=draws, device=device)
    iclr, journal = Authors(rows_ND, its, tokens), AuthorsJournal(rows_ND, others, tokens)
    mixture.prepare()
    return {
        "plain SGD": lambda: of_steps(plain, now),
        "twa": lambda: of_strategy(TWA(), mixture, now),
        "sewa --samples 1": lambda: of_strategy(SeWA(k=5, samples=1), mixture, now),
        "authors' TWA (ICLR)": lambda: of_steps(iclr.step, now),
        "authors' TWA (journal, 4 bits)": lambda: of_steps(journal.step, now),
    }


def show(times: Mapping[str, list[Used]], parts: Mapping[str, Used]) -> None:
    unit = least(times["plain SGD"])
    print("                                      ms  of the processor   ratio  of the processor")
    for what, used in times.items():
        one = least(used)
        ratios = f"{one.clock / unit.clock:6.3f}  {one.processor / unit.processor:16.3f}"
        print(f"{what:30}  {1000 * one.clock:8.1f}  {1000 * one.processor:16.1f}  {ratios}")
    print("of a twa step:")
    for what, one in parts.items():
        print(f"  {what:28}  {1000 * one.clock:8.1f}  {1000 * one.processor:16.1f}")
    passes = {"forward", "backward"}
    clock, processor = (
        sum(one[k] for one in parts.values()) / sum(parts[what][k] for what in passes) for k in range(2)
    )
    print(f"the step by its own forward and backward passes{'':13}{clock:6.3f}  {processor:16.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--offload", default="none", choices=("none", "cpu", "disk"))
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    now = clock_of(device)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), options.candidates)
        with discover([Path(name)]) as found:
            torch.manual_seed(0)
            tokens = torch.randint(VOCABULARY, (32, 128), device=device)
            search = SearchOptions(precision=options.precision, offload=options.offload, compile=options.compile)
            mixture = Mixture(Task(tokens), found.checkpoints, Run(device=device), search)
            works = contenders(mixture, tokens, now)
            times: dict[str, list[Used]] = {what: [] for what in works}
            for _ in range(options.rounds):
                for what, work in works.items():
                    times[what] += work()
            parts = parts_of_a_step(mixture, now, options.rounds)
            size = sum(w.numel() for w in mixture.mixed.model.parameters())
    print(f"{torch.get_num_threads()} threads, {device}; N = {options.candidates}, D = {size:,}, "
          f"{tokens.numel():,} tokens; {options.rounds} rounds of {STEPS} steps")  # fmt: skip
    show(times, parts)
    for what in ("twa", "sewa --samples 1"):
        ratio = least(times[what]).clock / least(times["plain SGD"]).clock
        target(f"a step of `{what}`, relative to one of plain SGD", ratio, 1.15, "×")


if __name__ == "__main__":
    main()
