"""Pickled modules are read as the state dict that ``state_dict()`` of the module returns, and nothing is imported."""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch_archives import expected, read, values

from ckptavg.readers import ModuleState, Refused, open_reader


class Parts(nn.Module):
    """A module with everything that ``state_dict()`` treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2))
        self.missing = self.register_parameter("none", None)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("transient", torch.arange(4.0), persistent=False)
        self.register_buffer("empty", None)
        self.body = nn.ModuleList([nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), nn.Identity()])
        self.by_name = nn.ModuleDict({"a": nn.LSTM(2, 3, bidirectional=True), "b": nn.ParameterList([torch.ones(2)])})
        self.head, self.twin = nn.Linear(3, 4), nn.Linear(3, 4)
        self.twin.weight = self.head.weight
        self.shared, self.gone = self.head, None
        self.add_module("nothing", None)
        self.settings = {"lr": 0.1, "hook": print, "tensor": torch.ones(9)}


class Criterion:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


def with_cycles() -> nn.Module:
    model = Parts()
    model.criterion = Criterion(model)  # type: ignore[assignment]
    model.head.register_forward_hook(model.twin.forward)
    object.__setattr__(model.body[0], "parent", [model])
    return model


class Old(nn.BatchNorm1d):
    """As pickled by torch < 1.6, which had only persistent buffers."""

    def __getstate__(self) -> object:
        return {name: value for name, value in self.__dict__.items() if name != "_non_persistent_buffers_set"}


class WithState(nn.Linear):
    def __getstate__(self) -> object:
        return self.__dict__, {"slot": 3}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])


def rebuilt(cls: type, size: int) -> nn.Module:
    return cls(size, size)


class Rebuilt(nn.Linear):
    def __reduce__(self) -> Any:
        return rebuilt, (type(self), 3), self.__dict__


class ByReconstructor(nn.Linear):
    def __reduce__(self) -> Any:
        return copyreg._reconstructor, (type(self), object, None), self.__dict__  # type: ignore[attr-defined]


def weight_norm() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(nn.Linear(3, 4))


MODULES: Mapping[str, Callable[[], nn.Module]] = {
    "parts": Parts,
    "half": lambda: Parts().half(),
    "cycles": with_cycles,
    "of torch 1.5": lambda: Old(3),
    "weight norm": weight_norm,
    "state and slots": lambda: WithState(2, 3),
    "made by a function": lambda: Rebuilt(3, 3),
    "made by copyreg": lambda: ByReconstructor(3, 3),
    "data parallel": lambda: nn.DataParallel(Parts()),
    "compiled": lambda: torch.compile(Parts(), backend="eager"),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(Parts()),
    "traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU())),
    "checkpointed": lambda: nn.Sequential(checkpoint_wrapper(nn.Linear(2, 3))),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "no tensors but one": lambda: nn.Sequential(nn.ReLU(), nn.PReLU()),
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", MODULES)
def test_a_modules_tensors_are_those_of_its_state_dict(tmp_path: Path, name: str, protocol: int) -> None:
    module = MODULES[name]()
    torch.save(module, tmp_path / "model.pt", pickle_protocol=protocol)
    reader = open_reader(tmp_path / "model.pt")
    assert values(reader) == expected(module.state_dict())
    assert list(reader.tree) == list(module.state_dict())
    assert isinstance(reader.tree, ModuleState)
    reader.close()


def test_modules_are_found_in_containers_and_in_attributes_of_objects(tmp_path: Path) -> None:
    models = [nn.Linear(2, 2), nn.Linear(2, 3)]
    holder = Criterion(models[1])
    torch.save(
        {"list": models, "deep": {"a": models[0]}, "trainer": holder, "same": holder, "loss": nn.MSELoss()},
        tmp_path / "a.pt",
    )
    reader = open_reader(tmp_path / "a.pt")
    states = [expected(model.state_dict()) for model in models]
    of_holder = {"model": states[1]}
    assert values(reader) == {
        "list": states,
        "deep": {"a": states[0]},
        "trainer": of_holder,
        "same": of_holder,
        "loss": {},
    }
    reader.close()
    torch.save(holder, tmp_path / "b.pt")
    assert read(tmp_path / "b.pt") == of_holder


def test_a_module_whose_tensors_are_not_in_its_state_is_refused_by_class(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2), nn.PReLU()), {nn.Linear})
    torch.save({"model": model}, tmp_path / "model.pt")
    tree = open_reader(tmp_path / "model.pt").tree["model"]
    assert isinstance(tree, Mapping)
    refused = {name: node.reason for name, node in tree.items() if isinstance(node, Refused)}
    assert list(refused) == ["0"]
    assert "quantized.dynamic.modules.linear.Linear whose weights are not visible" in refused["0"]
