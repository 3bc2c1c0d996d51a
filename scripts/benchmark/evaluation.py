"""Cost of an evaluation besides its forward passes: python scripts/benchmark/evaluation.py

A greedy soup of N checkpoints of a 10-million-parameter transformer grows by one candidate at a time. Its mixtures are
made in three ways: from the matrix in memory, all rows; from the files (--offload disk), only the row that a soup adds
to the previous one; and from the files, all rows of each soup again. For comparison, the forward pass of one evaluation
over a batch of 4,096 tokens. Then the score of a BatchNorm network, with data read for each pass or kept on the device.

The minimum of each figure is printed. CPU seconds are the more stable figure on a shared machine.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

from step import VOCABULARY, Clock, Task, Used, clock_of, least, network, write  # first: it sets torch's wait policy

# isort: split
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ckptavg import tasks
from ckptavg.batches import cache
from ckptavg.candidates import Candidates, plan
from ckptavg.checkpoints.discover import discover
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture
from ckptavg.score import Split

EXAMPLES = 4096


def measured(work: Callable[[], object], now: Clock, rounds: int) -> Used:
    found: list[Used] = []
    for _ in range(rounds):
        before = now()
        work()
        found.append(now().since(before))
    return least(found)


def grow(candidates: Candidates) -> None:
    """Build the mixtures of a soup that grows by one candidate at a time, from half of the candidates to all."""
    n = candidates.n
    for k in range(n // 2, n + 1):
        if not candidates.average(range(k)):
            candidates.materialize(torch.tensor(Coefficients.uniform(range(k), n).values))


def soups(folder: Path, device: torch.device, now: Clock, rounds: int) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (32, 128), device=device)
    with discover([folder]) as found:
        files = found.checkpoints
        n, count = len(files), len(files) - len(files) // 2 + 1
        task = Task(tokens)
        mixture = Mixture(task, files, Run(device=device))  # pyright: ignore
        mixture.mixed.candidates.materialize(mixture.losses.uniform())
        forward = measured(lambda: mixture.scoring.evaluate("val", "it"), now, rounds)
        print(f"N = {n}, soups of {n // 2} to {n}, D = {sum(w.numel() for w in mixture.mixed.model.parameters()):,}")
        print("                                     ms  of the processor  of an evaluation of one batch")
        print(f"evaluating 4,096 tokens        {1000 * forward.clock:8.1f}  {1000 * forward.processor:16.1f}")
        kept_sum = Candidates(network().to(device), files, lambda *_: None, offload="disk")
        with patch.object(plan, "free_memory", return_value=0):  # so that no mixture is kept
            anew = Candidates(network().to(device), files, lambda *_: None, offload="disk")
        for what, soup in (
            ("mixing in memory, all rows", mixture.mixed.candidates),
            ("from files, by the difference", kept_sum),
            ("from files, anew", anew),
        ):
            used = measured(partial(grow, soup), now, rounds)
            each = Used(used.clock / count, used.processor / count)
            part = each.processor / (each.processor + forward.processor)
            print(f"{what:29}  {1000 * each.clock:8.1f}  {1000 * each.processor:16.1f}  {part:29.1%}")


class Images(tasks.Task):
    """A BatchNorm network with images from a DataLoader."""

    source, metric, metric_goal, metric_bounds, corpus, whole = "evaluation.py", None, "max", None, None, None
    metric_key, predict = None, None

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        images = torch.randint(256, (EXAMPLES, 3, 32, 32), generator=draws, dtype=torch.uint8)
        self._data = TensorDataset(images.float() / 255, torch.randint(10, (EXAMPLES,), generator=draws))

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2),
            nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(model(images), labels)

    def has(self, split: Split) -> bool:
        return split in ("val", "train")

    def batches(self, split: Split):
        return iter(DataLoader(self._data, batch_size=128, shuffle=split == "train"))

    def examples(self, split: Split) -> int:
        return EXAMPLES

    def length(self, split: Split) -> int:
        return EXAMPLES // 128

    def halve(self) -> bool:
        return False


def batchnorm(folder: Path, device: torch.device, now: Clock, rounds: int) -> None:
    task, used = Images(), dict[str, Used]()
    for step in range(rounds + 3):
        torch.manual_seed(step)
        save_file(task.model().state_dict(), folder / f"step-{step}.safetensors")
    room = cache.HOST
    with discover([folder]) as found:
        for what, cache.HOST in (("read for each pass", 0), ("kept on the device", room)):
            mixture = Mixture(task, found.checkpoints, Run(device=device))  # pyright: ignore
            mixture.score(Coefficients.uniform([0], mixture.n))
            rest = iter(range(1, mixture.n))
            scored = lambda: mixture.score(Coefficients.uniform([next(rest)], mixture.n))  # noqa: B023, E731
            used[what] = measured(scored, now, rounds)
    cache.HOST = room
    print(f"\na score of a BatchNorm network on {EXAMPLES:,} images of 32×32, statistics recomputed on as many")
    for what, one in used.items():
        ratio = one.processor / used["read for each pass"].processor
        print(f"{what:29}  {1000 * one.clock:8.1f}  {1000 * one.processor:16.1f}  {ratio:29.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    now = clock_of(device)
    print(f"{torch.get_num_threads()} threads, {device}")
    with tempfile.TemporaryDirectory() as large, tempfile.TemporaryDirectory() as small:
        write(Path(large), options.candidates)
        soups(Path(large), device, now, options.rounds)
        batchnorm(Path(small), device, now, options.rounds)


if __name__ == "__main__":
    main()
