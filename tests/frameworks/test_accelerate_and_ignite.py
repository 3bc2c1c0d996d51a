"""Accelerate's save_state and PyTorch-Ignite's checkpoints, written by these libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from torch import nn

from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.errors import InputError


@pytest.mark.parametrize("automatic", [True, False])
def test_states_of_accelerate_are_complete_checkpoints(run: Run, tmp_path: Path, automatic: bool):
    accelerate = pytest.importorskip("accelerate")
    configuration = accelerate.utils.ProjectConfiguration(
        project_dir=str(tmp_path / "run"), automatic_checkpoint_naming=automatic
    )
    accelerator = accelerate.Accelerator(cpu=True, project_config=configuration)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    net, optimizer = accelerator.prepare(net, optimizer)
    for i in (1, 2, 3):
        for parameter in net.parameters():
            nn.init.constant_(parameter, i)
        accelerator.save_state(None if automatic else str(tmp_path / "run" / "checkpoints" / f"step_{9 + i}"))
    accelerator.free_memory()
    with discover([tmp_path / "run" / "checkpoints"]) as found:
        assert [one.step for one in found.checkpoints] == ([0, 1, 2] if automatic else [10, 11, 12])
        assert found.layout == "Accelerate save_state, 3 steps"
    done = run("swa", "run/checkpoints")
    assert done.returncode == 0, done.stderr
    assert all((tensor == 2).all() for tensor in load_file(tmp_path / "averaged.safetensors").values())


def test_two_models_of_accelerate_are_listed_and_each_can_be_chosen(tmp_path: Path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(3, 2), nn.Linear(5, 1))
    for step in (1, 2):
        accelerator.save_state(str(tmp_path / f"step_{step}"))
        for model in accelerator._models:
            nn.init.constant_(model.weight, step)
    accelerator.free_memory()
    with pytest.raises(InputError, match=r"several models: model\.safetensors \(2\), model_1\.safetensors \(2\)"):
        discover([tmp_path])
    with discover([tmp_path], Window(component="model_1.safetensors")) as found:
        assert [one.spec("weight").shape for one in found.checkpoints] == [(1, 5)] * 2


def test_scores_in_the_names_of_ignite_are_no_steps(tmp_path: Path):
    handlers = pytest.importorskip("ignite.handlers")
    engine = pytest.importorskip("ignite.engine")
    trainer = engine.Engine(lambda *_: None)
    net = nn.Linear(2, 2)
    scores = iter([0.61, 0.8, 0.7125, 0.79])
    saver = handlers.ModelCheckpoint(
        str(tmp_path), "best", score_function=lambda _: next(scores), score_name="accuracy", n_saved=4,
        global_step_transform=lambda engine, _: engine.state.epoch, require_empty=False,
    )  # fmt: skip

    @trainer.on(engine.Events.EPOCH_COMPLETED)
    def _(current: object) -> None:
        nn.init.constant_(net.weight, trainer.state.epoch)

    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, saver, {"model": net})
    trainer.run([0], max_epochs=4)
    with discover([tmp_path]) as found:
        assert [one.step for one in found.checkpoints] == [1, 2, 3, 4], [one.name for one in found.checkpoints]
