"""Memory needed for learning: reported before it is allocated; errors suggest settings that fit."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK, Run
from safetensors.torch import save_file
from torch import nn

from ckptavg.candidates import Candidates, plan
from ckptavg.candidates.copied import copied_tensors
from ckptavg.candidates.plan import Plan
from ckptavg.errors import OutOfMemoryError

GB = 10**9
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# a float32 model of 4 GB whose parameters are all of it
LARGE = Plan(
    n=10, elements=GB, size=4 * GB, gradient=4 * GB, bits=32, group_size=128, offload="none", device=CUDA,
    present=4 * GB,
)  # fmt: skip


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Device type → free bytes in addition to the model, to be set by tests."""
    free_bytes = {"cpu": 0, "cuda": 0}
    monkeypatch.setattr("ckptavg.candidates.plan.free_memory", lambda device: free_bytes[device.type])
    return free_bytes


def test_memory_is_the_matrix_the_model_and_one_gradient(free: dict[str, int]):
    free |= {"cuda": 44 * GB}
    assert LARGE.check() == (
        "memory: 10 candidates 40.00 GB + model 4.00 GB + gradient 4.00 GB = 48.00 GB on cuda:0; 48.00 GB free"
    )
    free |= {"cuda": 44 * GB - 1}
    with pytest.raises(OutOfMemoryError, match=r"= 48\.00 GB on cuda:0, but only 48\.00 GB on cuda:0 and 0\.0 kB"):
        LARGE.check()


@pytest.mark.parametrize(
    ("cuda", "cpu", "plan", "hint"),
    [
        # 16 bits: 10 · 10⁹ · (2 + 8/128) + 4 · 10⁹ for the mean; 9 candidates: 36 + 8 GB; two buffers of 32 MiB
        (43, 100, {}, "--bits 16 (32.62 GB), --offload cpu (8.07 GB), --last 9 (44.00 GB)"),
        (20, 30, {}, "--bits 8 (22.62 GB), --offload disk (8.07 GB), --last 4 (24.00 GB)"),
        (8, 100, {}, "--offload cpu (8.07 GB)"),
        (13, 100, {"n": 3}, "--bits 8 (15.19 GB), --offload cpu (8.07 GB), --last 2 (16.00 GB)"),
        (3, 100, {}, None),
        (20, 30, {"offload": "cpu"}, "--offload disk (8.07 GB), --last 7 (8.07 GB)"),
    ],
)
def test_the_hint_names_the_mildest_settings_that_fit(
    free: dict[str, int], cuda: int, cpu: int, plan: dict[str, Any], hint: str | None
):
    free |= {"cuda": cuda * GB, "cpu": cpu * GB}
    with pytest.raises(OutOfMemoryError) as refused:
        replace(LARGE, **plan).check()
    assert refused.value.exit_code == 8
    shown = f"this would fit: {hint}" if hint else "no --bits, --offload or --last would fit"
    assert refused.value.hint == shown
    # the suggested settings are accepted, and the next milder ones are not
    for option, value in re.findall(r"--(\w+) (\w+)", hint or ""):
        name = {"last": "n"}.get(option, option)
        wanted: Any = value if option == "offload" else int(value)
        more = {"bits": 32} if option == "offload" else {}
        replace(LARGE, **{**plan, **more, name: wanted}).check()
        if option == "last" and int(value) + 1 < replace(LARGE, **plan).n:
            with pytest.raises(OutOfMemoryError):
                replace(LARGE, **{**plan, "n": int(value) + 1}).check()


def test_offloading_to_cpu_is_not_suggested_for_a_cpu_model(free: dict[str, int]):
    free |= {"cpu": 20 * GB}
    with pytest.raises(OutOfMemoryError) as refused:
        replace(LARGE, device=CPU).check()
    assert refused.value.hint == "this would fit: --bits 8 (22.62 GB), --offload disk (8.07 GB), --last 4 (24.00 GB)"
    assert replace(LARGE, device=CPU, offload="cpu").needed == replace(LARGE, device=CPU).needed


def test_the_plan_matches_the_allocated_memory(tmp_path: Path):
    from stored import stored

    tied = nn.Linear(30, 30, bias=False)
    model = nn.Sequential(nn.BatchNorm1d(30), tied, nn.Linear(30, 30, bias=False))
    model[2].weight = tied.weight
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files = stored(tmp_path, [state] * 4)
    settings: list[dict[str, Any]] = [{"bits": 32}, {"bits": 32, "offload": "disk"}, {"bits": 32, "offload": "cpu"}]
    for given in settings:
        plan = Plan.of(
            model, 4, copies=copied_tensors(model, files), group_size=128, device=CPU, **{"offload": "none", **given}
        )
        made = Candidates(model, files, lambda *_: None, **given)
        assert plan.matrix == made.nbytes
        assert plan.size == plan.gradient == 4 * (900 + 2 * 30)
        assert plan.copied == 2 * 4 * (2 * 30)  # the statistics, equal in all candidates, and one copy of them


def test_a_run_prints_the_plan_and_exits_with_8_if_it_does_not_fit(
    run: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ("sewa", digits, "--last", 6, "--k", 2, "--steps", 2, "--task", TASK, "--no-baselines")
    done = run(*command)
    assert done.returncode == 0
    assert "6 candidates 0.24 MB + model 40.5 kB + gradient 40.1 kB = 0.32 MB on cpu; " in done.stderr
    assert "candidates 0.24 MB" not in run(*command, "-q", "--force").stderr
    monkeypatch.setattr("ckptavg.candidates.plan.free_memory", lambda device: 200_000)
    done = run(*command, "-o", "other")
    assert done.returncode == 8 and done.stdout == ""
    assert "error: not enough memory: 6 candidates 0.24 MB + model" in done.stderr
    assert "hint: this would fit: --bits 8 (0.19 MB), --last 3 (0.20 MB)\n" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["averaged.safetensors"]
    assert run(*command, "-o", "other", "--bits", 8).returncode == 0


@pytest.mark.parametrize(
    "files",
    [
        {"max": 1000, "current": 700, "stat": "anon 5\nactive_file 100\ninactive_file 30\nslab 7"},
        {"limit_in_bytes": 1000, "usage_in_bytes": 700, "stat": "active_file 9\ntotal_active_file 100\n"
         "total_inactive_file 30"},
    ],
    ids=["version-2", "version-1"],
)  # fmt: skip
def test_memory_is_limited_by_control_groups_of_either_version(
    files: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = plan.free_memory(CPU)
    monkeypatch.setattr(plan.cgroups, "groups", lambda controller: [tmp_path] if controller == "memory" else [])
    assert plan.free_memory(CPU) > 1000 <= whole  # no limit is known
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert plan.free_memory(CPU) == 1000 - 700 + 100 + 30  # the page cache counts as free
    (tmp_path / "memory.stat").unlink()
    assert plan.free_memory(CPU) == 300
    (tmp_path / f"memory.{next(iter(files))}").write_text("max\n")
    assert plan.free_memory(CPU) > 1000


def test_a_running_sum_is_announced_where_one_may_be_kept(free: dict[str, int]):
    free |= {"cpu": 1000 * GB, "cuda": 100 * GB}
    total = "and at most 8.00 GB for a sum on the host; "
    assert total in replace(LARGE, offload="disk").check()
    assert total in replace(LARGE, device=CPU, n=plan.FEW_ROWS + 1, bits=4).check()
    assert "for a sum" not in replace(LARGE, n=plan.FEW_ROWS + 1, bits=4).check()
    assert "for a sum" not in replace(LARGE, device=CPU, n=plan.FEW_ROWS).check()


PEAK = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn
from ckptavg.candidates import Candidates
from ckptavg.candidates.copied import copied_tensors
from ckptavg.candidates.plan import Plan
from ckptavg.checkpoints.discover import discover

def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
folder, dtype, bits, offload = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), sys.argv[4]
files = discover([Path(folder)]).checkpoints
model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4))).to(dtype)
c_N = torch.full((len(files),), 1 / len(files), dtype=torch.float64)
torch.mv(torch.ones(600, 500), torch.ones(500))  # loads the libraries
settings = {"bits": bits, "offload": offload, "group_size": 128}
plan = Plan.of(model, len(files), device=torch.device("cpu"), copies=copied_tensors(model, files), **settings)
before = peak()
one = Candidates(model, files, lambda *_: None, **settings)
one.materialize(c_N)
one.zero_gradient()
one.pullback()
one.distances()
one.materialize(torch.eye(len(files))[3])
for k in range(33, len(files)):
    assert one.average(range(k))
print(peak() - before, plan.needed + plan.running_sum)
"""
FIXED = 6 * plan.BUFFER  # a few pieces of all rows, whatever N and D are


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs VmHWM")
@pytest.mark.parametrize(
    ("dtype", "bits", "offload"),
    [("float32", 32, "none"), ("bfloat16", 32, "none"), ("float32", 8, "none"), ("float32", 4, "none"),
     ("float32", 32, "disk")],
)  # fmt: skip
def test_the_peak_of_many_candidates_is_what_the_plan_says(tmp_path: Path, dtype: str, bits: int, offload: str):
    """N = 100, D = 1,048,576: 420 MB of float32."""
    draws = torch.Generator().manual_seed(0)
    base = {f"{k}.weight": torch.randn(512, 512, generator=draws) for k in range(4)}
    for i in range(100):
        save_file({name: w + 0.01 * i for name, w in base.items()}, tmp_path / f"step-{i}.safetensors")
    call = [sys.executable, "-c", PEAK, str(tmp_path), dtype, str(bits), offload]
    used, said = map(int, subprocess.run(call, capture_output=True, text=True, check=True).stdout.split())
    assert used < said + FIXED
