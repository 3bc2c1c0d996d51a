"""A SeWA step beside a plain SGD step on the same model and batch, in one run: python scripts/benchmark/step.py

N candidates of a 10-million-parameter transformer on 4,096 tokens. Prints the ratio, and where the time goes.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ckptavg import candidates as matrix


class Rows:
    """A stand-in for a checkpoint on disk: random weights near the model's own."""

    def __init__(self, state: dict[str, Tensor], seed: int) -> None:
        from ckptavg.readers import StoredTensor

        self.tensors = {n: StoredTensor("F32", tuple(t.shape), n, 0) for n, t in state.items()}
        draws = torch.Generator().manual_seed(seed)
        self._values = {n: t + 0.01 * torch.randn(t.shape, generator=draws) for n, t in state.items()}
        self.path = None

    def spec(self, name: str):
        return self.tensors[name]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        flat = self._values[name].reshape(-1)[start:]
        torch.frombuffer(out, dtype=torch.float32).copy_(flat[: len(out) // 4])


def network() -> nn.Module:
    layer = nn.TransformerEncoderLayer(384, 6, 1152, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(1000, 384), nn.TransformerEncoder(layer, 6), nn.Linear(384, 1000))


def median(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    times: list[float] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = network().to(device)
    size = sum(p.numel() for p in model.parameters())
    tokens = torch.randint(1000, (32, 128), device=device)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}

    def forward_backward() -> None:
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

    sgd = torch.optim.SGD(model.parameters(), lr=0.01)

    def plain() -> None:
        sgd.zero_grad()
        forward_backward()
        sgd.step()

    plain_seconds = median(plain, options.rounds, device)
    rows = [Rows(state, seed) for seed in range(options.candidates)]
    mixed = matrix.Candidates(model, rows, lambda *_: None)
    c_N = torch.full((options.candidates,), 1 / options.candidates, device=device)

    def ours() -> None:
        mixed.materialize(c_N)
        mixed.zero_gradient()
        forward_backward()
        mixed.pullback()

    seconds = median(ours, options.rounds, device)
    parts = {name: median(work, options.rounds, device) for name, work in (
        ("materialize", lambda: mixed.materialize(c_N)), ("zero", mixed.zero_gradient), ("pullback", mixed.pullback),
    )}  # fmt: skip
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, {torch.get_num_threads()} threads, {device}")
    print(f"N = {options.candidates}, D = {size:,}: plain SGD step {plain_seconds:.3f} s, "
          f"step in the candidates' space {seconds:.3f} s = {seconds / plain_seconds:.2f} ×")  # fmt: skip
    print(", ".join(f"{name} {1000 * value:.1f} ms" for name, value in parts.items()))


if __name__ == "__main__":
    main()
