"""Checkpoints of Stable-Baselines3's CheckpointCallback: zip archives with ``policy.pth``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from by_hand import averaged_by_hand
from conftest import Run
from safetensors.torch import load_file

sb3 = pytest.importorskip("stable_baselines3")


def test_policies_are_averaged_and_load_into_the_policy(run: Run, tmp_path: Path):
    from stable_baselines3.common.callbacks import CheckpointCallback

    saving = CheckpointCallback(8, str(tmp_path / "ckpts"), name_prefix="rl_model")
    model = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu", seed=0)
    model.learn(24, callback=saving)
    paths = [tmp_path / "ckpts" / f"rl_model_{step}_steps.zip" for step in (8, 16, 24)]
    done = run("swa", tmp_path / "ckpts")
    assert done.returncode == 0, done.stderr
    assert "rl_model_8_steps.zip and 2 more: read policy.pth in it" in done.stderr
    expected = averaged_by_hand([dict(sb3.PPO.load(path, device="cpu").policy.state_dict()) for path in paths])
    averaged = load_file(tmp_path / "averaged.safetensors")
    model.policy.load_state_dict(averaged)
    for name, tensor in expected.items():
        torch.testing.assert_close(averaged[name], tensor, rtol=2**-23, atol=0)
    verified = run("verify", tmp_path / "averaged.safetensors", "--sources", tmp_path / "ckpts")
    assert verified.returncode == 0, verified.stderr
