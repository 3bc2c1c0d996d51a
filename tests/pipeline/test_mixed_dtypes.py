"""Candidates of several floating-point dtypes: refused without ``--dtype``, averaged and scored with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import Tensor

TASK = """
import torch
from torch import nn

def model(): return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
def val_dataloader():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return [(part, (part[:, 0] > 0).long()) for part in x.split(20)]
train_dataloader = val_dataloader
"""
DTYPES = (torch.float32, torch.float16, torch.float32, torch.float64, torch.bfloat16)


def state(step: int) -> dict[str, Tensor]:
    torch.manual_seed(step)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return {name: t.to(DTYPES[step - 1]) if t.is_floating_point() else t for name, t in net.state_dict().items()}


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    (tmp_path / "ckpts").mkdir()
    for step in range(1, 6):
        save_file(state(step), tmp_path / "ckpts" / f"step-{step}.safetensors")
    (tmp_path / "mine.py").write_text(TASK)
    return tmp_path / "ckpts"


def test_the_refusal_names_an_option_with_which_the_average_is_exact_and_verified(run: Run, ckpts: Path):
    refused = run("swa", "ckpts", "-o", "out")
    assert refused.returncode == 4
    assert "hint: average all of them with --dtype float64, or leave it out with" in refused.stderr
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        done = run("swa", "ckpts", "-o", "out", "--force", "--dtype", str(dtype).removeprefix("torch."))
        remark = "F32 in step-1.safetensors, step-3.safetensors; F16 in step-2.safetensors; F64 in step-4.safetensors; "
        assert f"differ in dtype: {remark}BF16 in step-5" in done.stderr
        mean = torch.stack([state(step)["0.weight"].double() for step in range(1, 6)]).sum(0) / 5
        written, tiny = load_file(ckpts.parent / "out")["0.weight"], 5 * 2**-53  # N float64 sums of values below 1
        torch.testing.assert_close(written, mean.to(dtype), rtol=torch.finfo(dtype).eps / 2, atol=tiny)
        assert run("verify", "out", "--sources", "ckpts").returncode == 0
    for path in ckpts.iterdir():
        save_file({name: t.to(torch.int32) for name, t in load_file(path).items()} | {"w": torch.ones(2)}, path)
    save_file({name: t.int() for name, t in state(1).items()} | {"w": torch.ones(3)}, ckpts / "step-1.safetensors")
    assert "--dtype" not in run("swa", "ckpts", "-o", "out").stderr  # of other differences it is no way out


@pytest.mark.parametrize(
    "words",
    [
        ("soup",), ("sewa", "--k", 2, "--steps", 5), ("sewa", "--k", 2, "--solver", "quadratic"),
        ("twa", "--epochs", 2, "--bits", 4), ("soup", "--offload", "disk"), ("swa", "--keep", "0.*"),
        ("swa", "--allow-nonfinite"), ("swa", "--format", "dcp"), ("swa", "--max-shard-size", "1KB", "-o", "out/"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)  # fmt: skip
def test_every_way_to_search_and_write_takes_them(run: Run, ckpts: Path, words: tuple[Any, ...]):
    done = run(*words[:1], "ckpts", "--task", "mine.py", "-o", "out", "--dtype", "float32", *words[1:], "--json")
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)["output"]
    assert output["dtype"] == "float32" and run("verify", output["path"], "--sources", "ckpts").returncode == 0


def test_commands_that_write_no_model_take_them_as_they_are(run: Run, ckpts: Path):
    for words in (("eval",), ("check",), ("landscape", "--bits", 4)):
        done = run(words[0], "ckpts", "--task", "mine.py", *words[1:])
        assert done.returncode == 0, done.stderr
