"""Test one process under torchrun: sums by NCCL (gloo on the CPU), and a model that FSDP2 shards over that process.

torchrun --standalone --nproc-per-node 1 scripts/gpu/one_process.py OUT [--device cuda]
Writes one JSON line per comparison to OUT/process.jsonl; exits with 1 on any difference.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from speed import Made, ignore

from ckptavg.candidates import Candidates, sharded
from ckptavg.candidates.flat import Flat, unique_tensors
from ckptavg.coefficients import EVERYTHING
from ckptavg.runtime.workers import Workers

N = 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 7)).bfloat16()


def passed(model: nn.Module, device: torch.device) -> Tensor:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach()


def plain(device: torch.device, c_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of a mixture and its gradient in the coefficients."""
    model = network().to(device)
    rows = Candidates(model, [Made(model, i) for i in range(N)], ignore)  # pyright: ignore
    rows.materialize(c_N)
    rows.zero_gradient()
    return passed(model, device), rows.pullback(EVERYTHING)


def of_shards(device: torch.device, c_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same by FSDP2: weight shards are copied from the flat vector, gradient shards into it."""
    workers = Workers()
    example = network()
    model = sharded.build(network, device, workers)
    flat: Flat = sharded.flatten_shards(model, unique_tensors(model), workers)
    rows_ND = torch.empty(N, len(flat.weights_D), dtype=torch.bfloat16, device=device)
    for i in range(N):
        one = Made(example, i)
        for slot in flat.slots:
            buffer = bytearray(2 * slot.numel)
            one.read_into(slot.names[0], slot.first, memoryview(buffer))
            rows_ND[i, slot.start :][: slot.numel] = torch.frombuffer(buffer, dtype=torch.bfloat16)
    flat.weights_D.copy_(rows_ND.float().t().mv(c_N.float()))
    flat.push()
    loss = passed(model, device)
    return loss, rows_ND[:, : len(flat.gradient_Q)].float().mv(flat.gradient_Q.float())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo"  # as in ckptavg.runtime.workers.joined
    distributed.init_process_group(backend)
    c_N = torch.full((N,), 1 / N, dtype=torch.float64, device=device)
    found: dict[str, float] = {}
    number = torch.full((3,), 1 / 3, dtype=torch.float64, device=device)
    distributed.all_reduce(number)
    found["a sum of float64 numbers"] = float((number - 1 / 3).abs().max())
    told = [{"a": 1}]
    distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    found["an object told to all"] = float(told != [{"a": 1}])
    expected, got = plain(device, c_N), of_shards(device, c_N)
    for what, one, other in zip(("the loss of FSDP2's model", "its gradient"), expected, got, strict=True):
        found[what] = float((one - other).abs().max() / one.abs().max())
    distributed.destroy_process_group()
    failed = False
    with (options.out / "process.jsonl").open("w") as file:
        for what, difference in found.items():
            bad = difference > 2**-7  # one unit in the last place of bfloat16
            failed |= bad
            line = {"what": what, "backend": backend.split(",")[-1], "difference": difference, "ok": not bad}
            print(json.dumps(line), file=file)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
