"""Checkpoints written by Lightning's Trainer: averaged, loaded back, compared with float64 by hand."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning
import pytest
import torch
from by_hand import averaged_by_hand
from conftest import Run
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from templates import fill_in
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ckptavg
from ckptavg.callbacks import LightningCallback


class Module(lightning.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def data() -> DataLoader:
    draws = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(60, 4, generator=draws), torch.randint(3, (60,), generator=draws)), 10)


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore Lightning's warnings about few workers, no logger, and its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(folder: Path, *callbacks: lightning.Callback) -> Path:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        saver = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, save_last=True)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[saver, *callbacks], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Module(), data())
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("lightning") / "ckpts")


def test_a_run_is_averaged_and_loads_back(run: Run, run_folder: Path, tmp_path: Path):
    done = run("swa", run_folder)
    assert done.returncode == 0, done.stderr
    assert "last.ckpt: holds the same weights as" in done.stderr or "last.ckpt: is a link to" in done.stderr
    names = ["epoch=0-step=3.ckpt", "epoch=0-step=6.ckpt", "epoch=1-step=9.ckpt", "epoch=1-step=12.ckpt"]
    states = [torch.load(run_folder / name, weights_only=False)["state_dict"] for name in names]
    module = Module()
    module.load_state_dict(load_file(tmp_path / "averaged.safetensors"), strict=True)
    by_hand = Module()
    by_hand.load_state_dict(averaged_by_hand(states))
    x = torch.randn(20, 4)
    torch.testing.assert_close(module(x), by_hand(x), rtol=1e-6, atol=1e-6)


def test_steps_come_from_inside_whatever_the_names(run_folder: Path, tmp_path: Path):
    for i, path in enumerate(sorted(run_folder.glob("epoch*.ckpt"))):
        (tmp_path / f"{chr(ord('z') - i)}.ckpt").write_bytes(path.read_bytes())
    result = ckptavg.swa(tmp_path, output=tmp_path / "x")
    assert [one.step for one in result.candidates] == [3, 6, 9, 12]


def test_an_average_made_in_training_is_named_and_the_raw_weights_can_be_chosen(run: Run, tmp_path: Path):
    folder = trained(tmp_path / "ckpts", EMAWeightAveraging(decay=0.5))
    one = folder / "epoch=1-step=12.ckpt"
    stored = torch.load(one, weights_only=False)
    assert "current_model_state" in stored  # the subject of this test
    done = run("swa", folder)
    assert done.returncode == 0
    assert "took state_dict, which is an average already; the raw weights are current_model_state" in done.stderr
    for key in ("state_dict", "current_model_state"):
        assert run("last", folder, "--key", key, "--force").returncode == 0
        written = load_file(tmp_path / "averaged.safetensors")
        assert all(torch.equal(tensor, stored[key][name]) for name, tensor in written.items())


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_a_callback_averages_a_copy_of_the_module_when_the_training_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    callback = LightningCallback("soup", loss=loss, val=data())
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        folder = trained(tmp_path / "ckpts", callback)
    result = callback.result
    assert result.output.path == folder / "averaged.safetensors" and len(result.candidates) == 4
    assert f"ckptavg: {result.verdict}" in caplog.text
    by_hand = ckptavg.soup(
        sorted(folder.glob("epoch*.ckpt")), model=Module(), loss=loss, val=data(), output=tmp_path / "x"
    )
    assert result.output.data_digest == by_hand.output.data_digest


class Data(lightning.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return data()

    val_dataloader = test_dataloader = train_dataloader


def test_the_template_of_init_scores_the_module_that_was_trained(run: Run, run_folder: Path, tmp_path: Path):
    fill_in(run, tmp_path, "--lightning", {"from train import": "from test_lightning import"})
    done = run("aswa", run_folder, "--json")
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)["scores"]["test"]
    module = Module()
    module.load_state_dict(load_file(tmp_path / "averaged.safetensors"))
    inputs, labels = data().dataset[:]
    with torch.no_grad():
        logits = module(inputs)
    assert score["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert score["metric"] == pytest.approx(float((logits.argmax(dim=1) == labels).float().mean()), abs=1e-6)
