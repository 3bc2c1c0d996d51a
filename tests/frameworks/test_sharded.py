"""Runs whose checkpoints are directories of shards: DCP as torchtitan lays it out, FSDP under a Trainer, ZeRO."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from by_hand import averaged_by_hand
from conftest import Run
from safetensors.torch import load_file
from torch import nn

PICKLED_COMMAND = b"cposix\nsystem\n(S'touch pwned'\ntR."


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Save a model as a nested state dict three times in training, by torch.distributed.checkpoint."""
    folder = tmp_path_factory.mktemp("dcp")
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    states: list[dict[str, Any]] = []
    for step in (10, 20, 100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        optimizer.step()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        moments = {f"state.{i}.{name}": t for i, s in optimizer.state_dict()["state"].items() for name, t in s.items()}
        nested = {"model": model.state_dict(), "optimizer": moments, "train_state": {"step": torch.tensor(step)}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning that there is only one process
            dcp.save(nested, checkpoint_id=str(folder / f"step-{step}"), no_dist=True)
    return folder, states


def check(folder: Path, states: list[dict[str, Any]], written: Path) -> None:
    models = [network().eval(), network().eval()]
    models[0].load_state_dict(load_file(written), strict=True)
    models[1].load_state_dict(averaged_by_hand(states))
    x = torch.randn(20, 4)
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-6, atol=1e-6)


def test_a_torchtitan_run_is_averaged(run: Run, saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path):
    folder, states = saved
    shown = json.loads(run("inspect", folder, "--json").stdout)["candidates"]
    assert [(one["step"], one["format"], one["key"]) for one in shown] == [(n, "dcp", "model") for n in (10, 20, 100)]
    done = run("swa", folder)
    assert done.returncode == 0, done.stderr
    check(folder, states, tmp_path / "averaged.safetensors")
    checked = run("verify", "averaged.safetensors", "--sources", folder)
    assert checked.returncode == 0, checked.stderr


def test_one_directory_can_be_named(run: Run, saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path):
    folder, states = saved
    done = run("swa", folder / "step-10", folder / "step-100")
    assert done.returncode == 0, done.stderr
    check(folder, [states[0], states[2]], tmp_path / "averaged.safetensors")


def test_fsdp_shards_lie_inside_the_trainers_directories(
    run: Run, saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path
):
    folder, states = saved
    for step in (10, 20):
        there = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(folder / f"step-{step}", there / "pytorch_model_fsdp_0")
        shutil.copytree(folder / f"step-{step}", there / "optimizer_0")
        (there / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({}, there / "training_args.bin")
    done = run("swa", "run")
    assert done.returncode == 0, done.stderr
    check(folder, states[:2], tmp_path / "averaged.safetensors")


def test_an_interrupted_save_is_left_out_with_a_line_that_names_it(
    run: Run, saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path
):
    shutil.copytree(saved[0], tmp_path / "run")
    (tmp_path / "run" / "step-20" / ".metadata").unlink()
    done = run("swa", "run")
    assert done.returncode == 0, done.stderr
    assert any("left out" in line and "step-20" in line for line in done.stderr.splitlines()), done.stderr


def test_nothing_in_a_directory_is_run(run: Run, saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path):
    shutil.copytree(saved[0], tmp_path / "run")
    (tmp_path / "run" / "step-20" / ".metadata").write_bytes(PICKLED_COMMAND)
    os.utime(tmp_path / "run" / "step-20" / ".metadata")
    done = run("swa", "run")
    assert done.returncode == 3 and "Traceback" not in done.stderr and not (tmp_path / "pwned").exists()
