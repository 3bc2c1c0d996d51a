"""Checkpoints written by timm's CheckpointSaver.

timm's package imports torchvision, which has no build for every torch. The saver itself does not need it, so its module
is imported beside an empty ``timm`` whose ``__path__`` is the real one's, with stand-ins for names that it only refers
to.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import averaged_by_hand
from conftest import Run
from safetensors.torch import load_file
from torch import nn


class StandIn(types.ModuleType):
    """A module with a class of every name, in place of modules that are imported and not used."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture(scope="module")
def timm_utils() -> Iterator[Any]:
    """Import the saver and the EMA of timm."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None and spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    with pytest.MonkeyPatch.context() as patch:
        for name, path in (("timm", root), ("timm.utils", root / "utils"), ("timm.models", root / "nowhere")):
            package = types.ModuleType(name)
            package.__path__ = [str(path)]
            patch.setitem(sys.modules, name, package)
        for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc", "timm.layers"):
            patch.setitem(sys.modules, name, StandIn(name))
        saver = importlib.import_module("timm.utils.checkpoint_saver")
        ema = importlib.import_module("timm.utils.model_ema")
        yield types.SimpleNamespace(CheckpointSaver=saver.CheckpointSaver, ModelEmaV3=ema.ModelEmaV3)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def folder(timm_utils: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save four epochs with an EMA; the second is the best."""
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ema = timm_utils.ModelEmaV3(model, decay=0.5)
    saver = timm_utils.CheckpointSaver(
        model, optimizer, args=argparse.Namespace(model="net", lr=0.5), model_ema=ema,
        checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=10,
    )  # fmt: skip
    for epoch, metric in enumerate((50.0, 80.0, 60.0, 70.0)):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
            optimizer.step()
            ema.update(model)
        saver.save_checkpoint(epoch, metric=metric)
    return folder


def states(folder: Path, key: str) -> list[dict[str, Any]]:
    paths = [folder / f"checkpoint-{epoch}.pth.tar" for epoch in range(4)]
    return [torch.load(path, weights_only=False)[key] for path in paths]


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema"])
def test_each_epoch_counts_once_and_the_average_loads_back(run: Run, folder: Path, tmp_path: Path, key: str):
    assert {path.name for path in folder.glob("*.pth.tar")} >= {"last.pth.tar", "model_best.pth.tar"}
    done = run("swa", folder, *(() if key == "state_dict" else ("--key", key)))
    assert done.returncode == 0, done.stderr
    for name in ("last.pth.tar", "model_best.pth.tar"):
        assert f"{name}: is a link to" in done.stderr or f"{name}: holds the same weights as" in done.stderr
    assert ("took state_dict, not state_dict_ema" in done.stderr) == (key == "state_dict")
    models = [network().eval(), network().eval()]
    models[0].load_state_dict(load_file(tmp_path / "averaged.safetensors"), strict=True)
    models[1].load_state_dict(averaged_by_hand(states(folder, key)))
    x = torch.randn(20, 4)
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-6, atol=1e-6)


def test_the_epochs_are_the_steps(run: Run, folder: Path):
    import json

    done = run("inspect", folder, "--json")
    assert [one["step"] for one in json.loads(done.stdout)["candidates"]] == [0, 1, 2, 3]
