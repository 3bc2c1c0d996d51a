"""The model of a file is found, its other weights are named, and each key that a note or a hint names can be read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_archives import expected, values

from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.errors import InputError

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def weights(seed: int) -> dict[str, Tensor]:
    return dict(net(seed).state_dict())


def wrapped(prefix: str, seed: int, **beside: Tensor) -> dict[str, Tensor]:
    return {**{f"{prefix}{name}": tensor for name, tensor in weights(seed).items()}, **beside}


def opened(path: Path, content: object, key: str | None = None) -> tuple[str, object, str]:
    """Return the key taken, the tensors, and the notes of a file with this content."""
    torch.save(content, path)
    with discover([path], key=key) as found:
        (checkpoint,) = found.checkpoints
        return checkpoint.key, values(checkpoint.reader, dict(checkpoint.tensors)), "; ".join(checkpoint.notes)


NUMBER = torch.tensor(3)
AVERAGES: dict[str, Any] = {
    "ema": weights(2),
    "ema_state_dict": wrapped("module.", 2),
    "params_ema": weights(2),
    "any name": weights(2),
    "swa": wrapped("module.", 2, n_averaged=NUMBER),
    "ema of ema_pytorch": wrapped("ema_model.", 2, initted=NUMBER, step=NUMBER, **wrapped("online_model.", 1)),
    "ema_optimizer": {f"state.{name}.ema_params": tensor for name, tensor in weights(2).items()},
    "nets": {"ema": weights(2)},
    "averages": [weights(2)],
}


@pytest.mark.parametrize("name", AVERAGES)
def test_other_weights_of_the_model_are_named_with_a_key_that_reads_them(tmp_path: Path, name: str) -> None:
    content = {"model": weights(1), name: AVERAGES[name], "opt": OPTIMIZER, "optimizer": {"x": weights(3)}}
    key, tensors, notes = opened(tmp_path / "step-1.pt", content)
    assert (key, tensors) == ("model", expected(weights(1)))
    (other,) = re.findall(r"took model, not ([^;]*) \(--key \1 chooses\)", notes)
    assert opened(tmp_path / "step-1.pt", content, other)[:2] == (other, expected(weights(2)))


def test_weights_of_another_model_are_not_named(tmp_path: Path) -> None:
    others = {"critic": nn.Linear(3, 5).state_dict(), "head": {"0.weight": weights(1)["0.weight"]}, "opt": OPTIMIZER}
    assert opened(tmp_path / "step-1.pt", {"model": weights(1), **others})[2] == ""


def test_an_average_without_names_is_named_if_it_has_the_shapes(tmp_path: Path) -> None:
    for shadow, noted in (list(net(2).parameters()), True), ([torch.ones(9)] * 4, False):
        content = {"model": weights(1), "ema": {"decay": 0.9, "shadow_params": shadow}}
        assert ("ema.shadow_params is a list without names" in opened(tmp_path / "step-1.pt", content)[2]) is noted


@pytest.mark.parametrize(
    ("content", "raw"),
    [
        ({"meta": {"mmengine_version": ""}, "ema_state_dict": wrapped("module.", 2, steps=NUMBER)}, "ema_state_dict"),
        ({"current_model_state": weights(2)}, "current_model_state"),
    ],
)  # fmt: skip
def test_where_the_state_dict_is_the_average_the_raw_weights_are_named(
    tmp_path: Path, content: dict[str, Any], raw: str
) -> None:
    content = {"state_dict": weights(1), **content}
    key, tensors, notes = opened(tmp_path / "step-1.pt", content)
    assert (key, tensors) == ("state_dict", expected(weights(1)))
    assert notes == f"took state_dict, which is an average already; the raw weights are {raw} (--key {raw} takes them)"
    assert opened(tmp_path / "step-1.pt", content, raw)[1] == expected(weights(2))


@pytest.mark.parametrize(
    "state",
    [
        wrapped("module.", 1, step=torch.ones(3)),
        wrapped("module.", 1, other=NUMBER, step=NUMBER),
        wrapped("ema_model.", 1, **wrapped("online_model.", 2)),
        wrapped("ema_model.", 1),
    ],
)
def test_a_model_with_modules_of_such_names_keeps_all_its_names(tmp_path: Path, state: dict[str, Tensor]) -> None:
    assert opened(tmp_path / "step-1.pt", state)[1] == expected(state)


# ---- whole modules, as Ultralytics saves them


def test_while_training_runs_the_module_under_ema_is_taken(tmp_path: Path) -> None:
    ema = net(2).half()
    key, tensors, notes = opened(
        tmp_path / "epoch1.pt", {"epoch": 1, "model": None, "ema": ema, "optimizer": OPTIMIZER}
    )
    assert (key, tensors) == ("ema", expected(ema.state_dict()))
    assert "ema is a whole module of the class torch.nn.modules.container.Sequential" in notes
    assert "took ema, because model is None" in notes


def test_of_two_modules_the_model_is_taken_and_the_other_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, remark in (("ultralytics", ", as Ultralytics does"), ("mine", "")):
        cls = type("Net", (nn.BatchNorm1d,), {"__module__": f"{name}.nn"})
        for module in (name, f"{name}.nn"):
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(Net=cls))
        content = {"model": cls(3), "ema": cls(3).requires_grad_(False)}
        key, tensors, notes = opened(tmp_path / "last.pt", content)
        assert (key, tensors) == ("model", expected(content["model"].state_dict()))
        assert f"model is a whole module of the class {name}.nn.Net: took its parameters and" in notes
        assert f"took model, not ema (--key ema chooses{remark})" in notes
        assert opened(tmp_path / "last.pt", content, "ema")[1] == expected(content["ema"].state_dict())


def test_a_file_that_is_a_module_is_read(tmp_path: Path) -> None:
    key, tensors, notes = opened(tmp_path / "step-1.pt", nn.DataParallel(net(1)))
    assert (key, tensors) == ("", expected(weights(1)))
    assert "the file is a whole module of the class torch.nn.parallel.data_parallel.DataParallel" in notes


# ---- no model found


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"params": weights(1), "params_ema": weights(2)}, ["params", "params_ema"]),
        ({"epoch": 1, "models": [net(1), net(2)], "opt": OPTIMIZER}, ["models.0", "models.1"]),
        ({"a.b": {"c": {"d.e": weights(1)}}, "optimizer": {"s": weights(1)}, "rng": {"cpu": NUMBER}}, ["a.b.c.d.e"]),
        ({"bad": {"x": torch.eye(3).to_sparse()}, "net": net(1)}, ["net"]),
    ],
)  # fmt: skip
def test_every_key_that_the_error_names_can_be_read(tmp_path: Path, content: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(InputError, match="no model found at the usual keys") as caught:
        opened(tmp_path / "net_g_1.pth", content)
    one_of = "one of " if keys[1:] else ""
    assert (
        caught.value.hint
        == f"choose {one_of}{', '.join(keys)} with --key; where others differ, add --include 'net_g_*.pth'"
    )
    assert [opened(tmp_path / "net_g_1.pth", content, key)[0] for key in keys] == keys


@pytest.mark.parametrize("key", ["other", "epoch.x", "nets.2", "a.b.c", "model.weight"])
def test_a_key_that_leads_to_no_state_dict_is_refused_with_those_that_do(tmp_path: Path, key: str) -> None:
    content = {"model": weights(1), "epoch": 3, "nets": [weights(1)], "a.b": weights(1)}
    with pytest.raises(InputError, match=f"no model found at --key {key}; the file has model, epoch") as caught:
        opened(tmp_path / "net.pth", content, key)
    assert caught.value.hint == "choose one of model, a.b, nets.0 with --key"


def test_files_without_the_chosen_key_are_left_out_as_the_hint_says(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save({"params": nn.Linear(2, 2 + step).state_dict()}, tmp_path / f"net_d_{step}.pth")
        torch.save({"params": weights(1), "params_ema": weights(step)}, tmp_path / f"net_g_{step}.pth")
    with pytest.raises(InputError, match=r"net_d_1.pth: no model found at --key params_ema; .* has params") as caught:
        discover([tmp_path], key="params_ema")
    assert caught.value.hint == "choose params with --key, or leave out such files with --exclude 'net_d_*.pth'"
    for window, key, kind in (
        (Window(exclude="net_d_*.pth"), "params_ema", "g"), (Window(include="net_d_*.pth"), "params", "d")
    ):  # fmt: skip
        with discover([tmp_path], window, key) as found:
            assert {checkpoint.path.name for checkpoint in found.checkpoints} <= {f"net_{kind}_{i}.pth" for i in (1, 2)}


def test_a_file_with_nothing_but_an_unknown_object_says_how_to_save_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"left out objects of the classes .*Unknown") as caught:
        opened(tmp_path / "step-1.pt", {"model": Unknown(), "epoch": 3})
    assert caught.value.hint == "torch.save(model.state_dict(), 'model.pt') saves a model so that it can be averaged"


class Unknown:
    pass
