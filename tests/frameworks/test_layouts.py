"""fairseq, torchtune and Composer, which cannot be installed with this torch: layouts written as their savers do.

fairseq: ``checkpoint_utils.save_checkpoint``; torchtune: ``FullModelHFCheckpointer.save_checkpoint``;
Composer: ``CheckpointSaver`` with its default file name ``ep{epoch}-ba{batch}-rank{rank}.pt``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import averaged_by_hand
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import Tensor


def weights(seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {"fc.weight": torch.randn(5, 4, generator=draws), "fc.bias": torch.randn(5, generator=draws)}


def check(run: Run, folder: Path, tmp_path: Path, steps: list[int], *seeds: int) -> str:
    shown = run("inspect", folder, "--json")
    assert [one["step"] for one in json.loads(shown.stdout)["candidates"]] == steps
    done = run("swa", folder)
    assert done.returncode == 0, done.stderr
    expected = averaged_by_hand([weights(seed) for seed in seeds])
    written = load_file(tmp_path / "averaged.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-23, atol=0)
    return done.stderr


def fairseq(seed: int, updates: int) -> dict[str, Any]:
    return {
        "args": None,
        "cfg": {"model": argparse.Namespace(arch="transformer")},
        "model": weights(seed),
        "criterion": None,
        "optimizer_history": [
            {"optimizer_name": "FairseqAdam", "lr_scheduler_state": {"best": None}, "num_updates": updates // 2},
            {"optimizer_name": "FairseqAdam", "lr_scheduler_state": {"best": None}, "num_updates": updates},
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 3}, "val_loss": 2.5},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
    }


def test_fairseq_epochs_and_updates_are_ordered_by_updates(run: Run, tmp_path: Path):
    folder = tmp_path / "ckpts"
    folder.mkdir()
    torch.save(fairseq(1, 100), folder / "checkpoint1.pt")
    torch.save(fairseq(2, 150), folder / "checkpoint_2_150.pt")
    torch.save(fairseq(3, 200), folder / "checkpoint2.pt")
    shutil.copy(folder / "checkpoint2.pt", folder / "checkpoint_last.pt")
    shutil.copy(folder / "checkpoint1.pt", folder / "checkpoint_best.pt")
    output = check(run, folder, tmp_path, [100, 150, 200], 1, 2, 3)
    assert output.count("holds the same weights as") == 2


def test_torchtune_epochs(run: Run, tmp_path: Path):
    folder = tmp_path / "out"
    for epoch in range(3):
        there = folder / f"epoch_{epoch}"
        there.mkdir(parents=True)
        state = weights(epoch)
        shards = {"fc.weight": "model-00001-of-00002.safetensors", "fc.bias": "model-00002-of-00002.safetensors"}
        for name, shard in shards.items():
            save_file({name: state[name]}, there / shard, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 100}, "weight_map": shards}
        (there / "model.safetensors.index.json").write_text(json.dumps(index))
        (there / "config.json").write_text("{}")
    (folder / "recipe_state").mkdir()
    torch.save({"optimizer": {"state": {}}, "seed": 1, "epochs_run": 3}, folder / "recipe_state" / "recipe_state.pt")
    (folder / "logs").mkdir()
    check(run, folder, tmp_path, [0, 1, 2], 0, 1, 2)


def test_a_torchtune_model_of_one_shard_needs_no_index(run: Run, tmp_path: Path):
    for epoch in range(2):
        there = tmp_path / "out" / f"epoch_{epoch}"
        there.mkdir(parents=True)
        save_file(weights(epoch), there / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    check(run, tmp_path / "out", tmp_path, [0, 1], 0, 1)


def composer(seed: int) -> dict[str, Any]:
    return {
        "state": {
            "model": weights(seed),
            "optimizers": {"DecoupledAdamW": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
            "timestamp": {"Timestamp": {"batch": seed, "epoch": 0}},
            "rank_zero_seed": 17,
        },
        "rng": [{"python": (3, (1, 2), None), "torch": torch.get_rng_state()}],
    }


def test_composer_batches(run: Run, tmp_path: Path):
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for batch in (20, 100, 1000):
        torch.save(composer(batch), folder / f"ep0-ba{batch}-rank0.pt")
    (folder / "latest-rank0.pt").symlink_to("ep0-ba1000-rank0.pt")
    output = check(run, folder, tmp_path, [20, 100, 1000], 20, 100, 1000)
    assert "latest-rank0.pt: is a link to" in output


def test_composers_parts_of_several_processes_are_not_taken_for_models(run: Run, tmp_path: Path):
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for rank in (0, 1):
        torch.save(composer(rank), folder / f"ep0-ba10-rank{rank}.pt")
    done = run("swa", folder)
    assert done.returncode == 3 and "several processes saved" in done.stderr


@pytest.mark.parametrize("name", ["last.ckpt", "latest"])
def test_links_that_lead_nowhere_are_named(run: Run, tmp_path: Path, name: str):
    torch.save(weights(1), tmp_path / "step-1.pt")
    (tmp_path / name).symlink_to("gone.ckpt")
    done = run("swa", tmp_path, "-o", tmp_path / "out" / "x")
    assert done.returncode in (0, 3, 5) and "Traceback" not in done.stderr
