"""Streamed candidates: results of the dense matrix in bounded memory, and running sums without drift."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from stored import stored
from torch import Tensor, nn

from ckptavg.candidates import Candidates, streamed
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import EVERYTHING
from ckptavg.errors import InputError

N = 6
DEVICES = [
    pytest.param(("cpu", "disk"), id="disk"),
    pytest.param(("cuda", "disk"), id="disk to cuda", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cpu"), id="host to cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    device, offload = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return device, offload


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed.plan, "BUFFER", 1)
    monkeypatch.setattr(streamed.plan, "LEAST", 7)  # columns: many pieces, which end within tensors


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 11), nn.BatchNorm1d(11), nn.Linear(11, 3)).to(dtype)


class Tied(nn.Module):
    """Model with a tied parameter and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


def states(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return N state dicts with random values."""
    found: list[dict[str, Tensor]] = []
    for i in range(N):
        draws = torch.Generator().manual_seed(i)
        found.append(
            {name: (3 * torch.rand(t.shape, generator=draws)).to(t.dtype) for name, t in model.state_dict().items()}
        )
    return found


def checkpoints(folder: Path, model: nn.Module) -> tuple[Checkpoint, ...]:
    return stored(folder, states(model))


def ignore(stage: str, done: int, total: int) -> None:
    """Progress callback that does nothing."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layerwise", [False, True])
def test_materialize_and_pullback_match_the_dense_matrix(
    tmp_path: Path, place: tuple[str, str], dtype: torch.dtype, layerwise: bool
):
    device, offload = place
    files = checkpoints(tmp_path, network(dtype))
    dense = Candidates(network(dtype), files, ignore)
    other = Candidates(network(dtype).to(device), files, ignore, offload=offload)  # pyright: ignore[reportArgumentType]
    groups = dense.blocks(None) if layerwise else EVERYTHING
    c = torch.randn(len(groups), N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    found: list[tuple[Tensor, Tensor]] = []
    for one, there in ((dense, "cpu"), (other, device)):
        one.materialize(c.to(there), groups)
        one.zero_gradient()
        one.model(x.to(there)).float().square().sum().backward()
        found.append((one.pullback(groups).cpu(), one.distances(groups).cpu()))
    # N products and sums in the compute dtype, possibly in a different order; the largest weight is 3
    eps = torch.finfo(dtype).eps
    close = N * eps * 3 * float(c.abs().sum(dim=1).max())
    for name, expected in weights(dense.model).items():
        torch.testing.assert_close(weights(other.model)[name], expected, rtol=0, atol=close)
    for got, expected in zip(found[1], found[0], strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=100 * max(eps, 2**-23) * scale)
    assert other.nbytes < dense.nbytes


def test_tied_weights_and_integers_are_read_once(tmp_path: Path):
    state = states(Tied())
    for one in state:
        one["head.weight"] = one["embed.weight"].clone()
    other = Candidates(Tied(), stored(tmp_path, state), ignore, offload="disk")
    other.materialize(torch.eye(N)[3], last=2)
    assert torch.equal(other.model.state_dict()["count"], state[2]["count"])
    for name, tensor in weights(other.model).items():
        assert torch.equal(tensor, state[3][name]), name


def exact_mean(saved: list[dict[str, Tensor]], chosen: Sequence[int], name: str) -> list[Fraction]:
    rows = [saved[i][name].flatten().tolist() for i in chosen]
    return [sum(map(Fraction, column), Fraction()) / len(chosen) for column in zip(*rows, strict=True)]


def test_the_bits_of_a_mean_do_not_depend_on_the_preceding_subsets(tmp_path: Path):
    """All 63 subsets, in orders that change few or many rows, with weights of very different magnitudes."""
    draws = torch.Generator().manual_seed(0)
    saved = [
        {name: torch.randn(t.shape, generator=draws) * 10.0 ** torch.randint(-9, 3, t.shape, generator=draws)
         for name, t in nn.Linear(9, 8).state_dict().items()}
        for _ in range(N)
    ]  # fmt: skip
    files = stored(tmp_path, saved)
    subsets = [s for k in range(1, N + 1) for s in itertools.combinations(range(N), k)]
    gray = sorted(subsets, key=lambda s: [i in s for i in range(N)])
    found: list[dict[tuple[int, ...], dict[str, Tensor]]] = []
    for order in (gray, [subsets[17 * i % 63] for i in range(63)]):
        one = Candidates(nn.Linear(9, 8), files, ignore, offload="disk")
        found.append({})
        for subset in order:
            assert one.average(subset)
            found[-1][subset] = weights(one.model)
    for subset in subsets:
        fresh = Candidates(nn.Linear(9, 8), files, ignore, offload="disk")
        fresh.average(subset)
        for name, tensor in weights(fresh.model).items():
            assert all(torch.equal(other[subset][name], tensor) for other in found)
            largest = max(float(state[name].abs().max()) for state in saved)
            for got, exact in zip(tensor.flatten().tolist(), exact_mean(saved, subset, name), strict=True):
                bound = abs(exact) * Fraction(2) ** -24 + Fraction(N * largest) * Fraction(2) ** -49
                assert abs(Fraction(got) - exact) <= bound


def test_bits_are_the_same_if_the_sum_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = checkpoints(tmp_path, network())
    kept = Candidates(network(), files, ignore, offload="disk")
    monkeypatch.setattr("ckptavg.candidates.plan.free_memory", lambda device: 0)
    anew = Candidates(network(), files, ignore, offload="disk")
    for chosen in ([0], [0, 1], [0, 1, 4], [1, 4], [0, 1, 2, 3, 4, 5]):
        for one in (kept, anew):
            one.average(chosen)
        assert all(torch.equal(tensor, weights(anew.model)[name]) for name, tensor in weights(kept.model).items())


def test_a_new_subset_reads_only_the_rows_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = Candidates(network(), checkpoints(tmp_path, network()), ignore, offload="disk")
    read: set[int] = set()
    fill = streamed.Streamed._fill

    def recording(self: streamed.Streamed, i: int, start: int, out: Tensor) -> None:
        read.add(i)
        fill(self, i, start, out)

    monkeypatch.setattr(streamed.Streamed, "_fill", recording)
    for chosen, expected in (([0, 2, 3], {0, 2, 3}), ([0, 2, 3, 5], {5}), ([0, 2, 5], {3}), ([0, 2, 5], set()),
                             ([1], {1}), ([0, 1, 2, 3, 4], {0, 2, 3, 4})):  # fmt: skip
        read.clear()
        one.average(chosen)
        assert read == expected


def test_the_sum_is_recomputed_after_a_failed_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = checkpoints(tmp_path, network())
    one, other = (Candidates(network(), files, ignore, offload="disk") for _ in range(2))
    one.average([0, 1, 2])
    fill, calls = streamed.Streamed._fill, itertools.count()

    def broken(self: streamed.Streamed, i: int, start: int, out: Tensor) -> None:
        if next(calls) == 3:
            raise InputError("is gone")
        fill(self, i, start, out)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="is gone"):
        patch.setattr(streamed.Streamed, "_fill", broken)
        one.average([0, 1, 2, 3])
    for each in (one, other):
        each.average([0, 1, 2, 3])
    assert all(torch.equal(tensor, weights(other.model)[name]) for name, tensor in weights(one.model).items())


def test_a_modified_file_is_detected(tmp_path: Path):
    files = checkpoints(tmp_path, network())
    one = Candidates(network(), files, ignore, offload="disk")
    with files[4].path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    with pytest.raises(InputError, match=r"step-4\.safetensors: changed while it was being read"):
        one.materialize(torch.full((N,), 1 / N))


PEAK = """
import sys
from pathlib import Path
import torch
from torch import nn
from ckptavg.candidates import Candidates
from ckptavg.checkpoints.discover import discover

def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
model = nn.Linear(2048, 2048, bias=False)
n = int(sys.argv[2])
found = discover([Path(sys.argv[1])]).checkpoints[:n]
before = peak()
one = Candidates(model, found, lambda *_: None, offload="disk")
one.materialize(torch.full((n,), 1 / n))
one.pullback()
one.average(range(n))
print(peak() - before)
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_depend_on_the_number_of_candidates(tmp_path: Path):
    """
    A model of 16 MiB: weights, gradient, a float64 sum, two buffers of 32 MiB, and the overhead of torch.

    How far a reader is ahead, and with it the peak, varies by a few models; sixteen more candidates would be sixteen.
    """
    shared = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    stored(tmp_path, ({"weight": shared + i} for i in range(20)))

    def peak(n: int) -> int:
        call = [sys.executable, "-c", PEAK, str(tmp_path), str(n)]
        return int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)

    model, few, many = 2**24, peak(4), peak(20)
    assert many < 14 * model and many - few < 7 * model
