"""Complex weights are averaged, searched and written as pairs of real ones, which a real model stores as such."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

import ckptavg
from ckptavg.errors import OutputError

TASK = """
import torch
from torch import nn

class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.register_parameters()

    def forward(self, x):
        y = torch.fft.rfft(x) @ self.weight() + self.shift()
        return self.fc(torch.cat([y.real.tanh(), y.imag[:, :1].tanh()], dim=1))

class Complex(Spectral):
    def register_parameters(self):
        self.w = nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))
        self.register_buffer("s", torch.zeros(4, dtype=torch.complex64))
    def weight(self): return self.w
    def shift(self): return self.s

class Real(Spectral):
    def register_parameters(self):
        self.w = nn.Parameter(torch.zeros(3, 4, 2))
        self.register_buffer("s", torch.zeros(4, 2))
    def weight(self): return torch.view_as_complex(self.w)
    def shift(self): return torch.view_as_complex(self.s)

def model(): return {model}()
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
def val_dataloader():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))[:, :4]
    return [(part, (part[:, 0] > 0).long()) for part in x.split(20)]
train_dataloader = val_dataloader
"""


def state(step: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(step)
    w, s = (torch.randn(shape, generator=draws, dtype=torch.complex64) for shape in ((3, 4), (4,)))
    return {
        "fc.weight": torch.randn(3, 5, generator=draws), "fc.bias": torch.randn(3, generator=draws), "w": w, "s": s,
    }  # fmt: skip


def as_real(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.view_as_real(t).clone() if t.is_complex() else t for name, t in tensors.items()}


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Return a directory with the same candidates as complex and as real checkpoints, and a task for each."""
    for kind, convert in (("Complex", dict), ("Real", as_real)):
        (tmp_path / kind).mkdir()
        for step in range(1, 6):
            save_file(convert(state(step)), tmp_path / kind / f"step-{step}.safetensors")
        (tmp_path / f"{kind}.py").write_text(TASK.replace("{model}", kind))
    return tmp_path


SEARCHES: dict[str, tuple[Any, ...]] = {
    "swa": ("swa",), "soup": ("soup",), "aswa": ("aswa",), "sewa": ("sewa", "--k", 2, "--steps", 5),
    "twa": ("twa", "--epochs", 3), "twa by layers": ("twa", "--epochs", 3, "--layerwise"),
    "gauss-newton": ("twa", "--solver", "quadratic", "--hessian", "gauss-newton"),
    "exact": ("twa", "--solver", "quadratic", "--hessian", "exact"),
    "4 bits": ("twa", "--epochs", 3, "--bits", 4, "--group-size", 2), "disk": ("soup", "--offload", "disk"),
    "keep": ("swa", "--keep", "s"), "bfloat16": ("swa", "--dtype", "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_gives_what_it_gives_for_a_real_model_of_pairs(run: Run, jobs: Path, name: str):
    command, *options = SEARCHES[name]
    reports: list[dict[str, Any]] = []
    for kind in ("Complex", "Real"):
        done = run(command, kind, "--task", f"{kind}.py", "-o", f"{kind}.out", *options, "--json")
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
    coefficients = [torch.tensor([c["coefficient"] for c in report["candidates"]]) for report in reports]
    torch.testing.assert_close(*coefficients, rtol=1e-4, atol=1e-5)  # sums in float32, in another order
    scores = [torch.tensor(report["scores"]["val"]["loss"]) for report in reports]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
    assert reports[0]["output"]["dtype"] == "complex64, float32"
    mean, real = load_file(jobs / "Complex.out"), load_file(jobs / "Real.out")
    for tensor in real:
        torch.testing.assert_close(as_real(mean)[tensor], real[tensor], rtol=1e-4, atol=1e-4)
    assert run("verify", "Complex.out", "--sources", "Complex").returncode == 0


def test_real_and_imaginary_parts_are_rounded_as_floats_are_in_every_format(run: Run, jobs: Path):
    for step in range(1, 6):
        strided = state(step) | {"w": state(step)["w"].T.contiguous().T, "empty": torch.empty(0, dtype=torch.complex64)}
        torch.save(strided | {"scalar": torch.tensor(complex(step, 0.1))}, jobs / "Complex" / f"step-{step}.pt")
        (jobs / "Complex" / f"step-{step}.safetensors").unlink()
    ckptavg.swa(jobs / "Complex", output=jobs / "dcp", format="dcp")
    expected = sum(torch.view_as_real(state(step)["w"]).double() for step in range(1, 6)) / 5
    loaded = {"w": torch.zeros(3, 4, dtype=torch.complex64), "scalar": torch.zeros((), dtype=torch.complex64)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(loaded, storage_reader=FileSystemReader(jobs / "dcp"), no_dist=True)
    assert torch.equal(torch.view_as_real(loaded["w"]), torch.as_tensor(expected).float())
    assert loaded["scalar"] == torch.tensor(complex(3, 0.1), dtype=torch.complex64)
    assert run("verify", "dcp", "--sources", "Complex").returncode == 0
    ckptavg.last(jobs / "dcp", output=jobs / "read")  # what DCP wrote is read
    assert load_file(jobs / "read")["w"].equal(loaded["w"])


def test_a_complex_weight_that_is_not_finite_is_named(run: Run, jobs: Path):
    bad = state(3)
    torch.view_as_real(bad["w"])[1, 2, 1] = float("nan")
    save_file(bad, jobs / "Complex" / "step-3.safetensors")
    assert "step-3.safetensors: w: 1 value is NaN or infinite" in run("swa", "Complex", "-o", "out").stderr
    assert run("swa", "Complex", "-o", "out", "--skip-bad").returncode == 0


def test_complex128_is_refused_where_safetensors_cannot_hold_it_and_both_ways_out_work(jobs: Path):
    for step in range(1, 6):
        torch.save({"w": state(step)["w"].to(torch.complex128)}, jobs / "Real" / f"step-{step}.pt")
        (jobs / "Real" / f"step-{step}.safetensors").unlink()
    with pytest.raises(OutputError, match="complex128, which safetensors does not have") as error:
        ckptavg.swa(jobs / "Real", output=jobs / "out")
    assert error.value.hint == "--dtype float32 writes complex64; --format dcp has complex128"
    result = ckptavg.swa(jobs / "Real", output=jobs / "out", dtype="float32")
    assert (
        result.output and result.output.dtype == "complex64" and load_file(jobs / "out")["w"].dtype == torch.complex64
    )
    result = ckptavg.swa(jobs / "Real", output=jobs / "dcp", format="dcp")
    assert result.output and result.output.dtype == "complex128"
