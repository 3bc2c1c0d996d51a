"""Buffers that must not be averaged: masks of −inf, counters, and the options --keep and --average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckptavg
from ckptavg.errors import UsageError

TASK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mask", torch.zeros(4, 4))
        self.register_buffer("n_seen", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.prior = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x):
        attention = ((x.unsqueeze(2) * x.unsqueeze(1)) + self.mask + self.prior + self.frozen).softmax(dim=2)
        return self.fc((attention @ x.unsqueeze(2)).squeeze(2)) + (self.n_seen / 1000 + self.count / 100) * x[:, :3]

def model(): return Net()
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
def val_dataloader():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return [(part, (part[:, 0] > 0).long()) for part in x.split(20)]
"""
INF = float("inf")
MASK = torch.full((4, 4), -INF).triu(1)
ROW = torch.tensor([0.0, 0.5, 0.25, -INF])


def state(step: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(step)
    return {
        "fc.weight": torch.randn(3, 4, generator=draws), "fc.bias": torch.randn(3, generator=draws),
        "mask": MASK, "n_seen": torch.tensor(100.0 * step), "count": torch.tensor(step), "prior": ROW.clone(),
        "frozen": ROW,
    }  # fmt: skip


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    (tmp_path / "ckpts").mkdir()
    for step in range(1, 6):
        save_file(state(step), tmp_path / "ckpts" / f"step-{step}.safetensors")
    (tmp_path / "mine.py").write_text(TASK)
    return tmp_path / "ckpts"


STRATEGIES: dict[str, tuple[Any, ...]] = {
    "swa": ("swa",), "soup": ("soup",), "aswa": ("aswa",), "best": ("best",),
    "sewa": ("sewa", "--k", 2, "--steps", 5), "sewa quadratic": ("sewa", "--k", 2, "--solver", "quadratic"),
    "twa": ("twa", "--epochs", 5, "--lr", 0.5), "twa quadratic": ("twa", "--solver", "quadratic"),
    "twa in 4 bits": ("twa", "--epochs", 5, "--bits", 4), "soup from disk": ("soup", "--offload", "disk"),
    "twa by layers": ("twa", "--epochs", 5, "--layerwise", "--offload", "disk"),
    "twa exact": ("twa", "--solver", "quadratic", "--hessian", "exact"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_mask_that_all_candidates_share_is_copied_and_named_by_every_strategy(run: Run, ckpts: Path, name: str):
    done = run(*STRATEGIES[name], "ckpts", "--task", "mine.py", "-o", "out", "--skip-bad", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    written = load_file(ckpts.parent / "out")
    assert all(written[tensor].equal(state(1)[tensor]) for tensor in ("mask", "prior", "frozen"))
    assert "copied as it is, equal in all candidates and not finite: frozen, mask, prior" in report["warnings"]
    assert len(report["candidates"]) == 5 and report["scores"]["val"]["loss"] is not None
    assert run("verify", "out", "--sources", "ckpts").returncode == 0


def test_the_other_commands_accept_a_shared_mask(run: Run, ckpts: Path):
    for words in (
        ("eval", "ckpts", "--task", "mine.py"), ("eval", ckpts / "step-3.safetensors", "--task", "mine.py"),
        ("inspect", "ckpts", "--read-data"), ("landscape", "ckpts", "--task", "mine.py"),
        ("swa", "ckpts", "--last", 1),
    ):  # fmt: skip
        done = run(*words)
        assert done.returncode == 0, done.stderr


def change(folder: Path, step: int, name: str, value: float) -> None:
    changed = state(step)
    changed[name] = changed[name].clone()
    changed[name].view(-1)[0] = value
    save_file(changed, folder / f"step-{step}.safetensors")


@pytest.mark.parametrize("name", ["mask", "fc.bias"])
def test_only_checkpoints_that_differ_from_the_shared_mask_are_bad(run: Run, ckpts: Path, name: str):
    change(ckpts, 3, name, float("nan"))
    refused = run("swa", "ckpts", "-o", "out")
    assert (refused.returncode == 3 and f"step-3.safetensors: {name}" in refused.stderr) or name == "mask"
    done = run("swa", "ckpts", "-o", "out", "--skip-bad", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [Path(file["path"]).name for file in report["left_out"]] == ["step-3.safetensors"]


def test_a_hint_leaves_candidates_over(run: Run, ckpts: Path):
    """An infinite value in every candidate, at other places: no candidate could be left out."""
    for step in range(1, 6):
        change(ckpts, step, "mask", -INF if step % 2 else INF)
    for words in (("swa", "ckpts"), ("soup", "ckpts", "--task", "mine.py")):
        done = run(*words, "-o", "out")
        assert done.returncode == 3 and "mask" in done.stderr and "--allow-nonfinite" in done.stderr, done.stderr
        assert "--skip-bad" not in done.stderr and "--exclude" not in done.stderr
    done = run("swa", "ckpts", "-o", "out", "--keep", "mask")
    assert done.returncode == 0, done.stderr
    assert "taken from the last selected candidate and not finite: mask" in " ".join(done.stderr.split())


def test_buffers_that_are_averaged_are_named(run: Run, ckpts: Path):
    done = run("swa", "ckpts", "--task", "mine.py", "-o", "out", "--json")
    assert json.loads(done.stdout)["output"]["averaged_buffers"] == ["n_seen"]
    assert float(load_file(ckpts.parent / "out")["n_seen"]) == 300
    assert "averaged buffers: n_seen (--keep PATTERN copies" in " ".join(done.stderr.split())
    kept = json.loads(run("swa", "ckpts", "--task", "mine.py", "-o", "kept", "--json", "--keep", "n_*").stdout)
    assert kept["output"]["averaged_buffers"] == []
    assert (
        json.loads(run("last", "ckpts", "--task", "mine.py", "-o", "l", "--json").stdout)["output"]["averaged_buffers"]
        == []
    )  # one checkpoint: nothing was averaged


@pytest.mark.parametrize("name", STRATEGIES)
def test_kept_tensors_are_those_of_the_last_selected_candidate_in_every_strategy(run: Run, ckpts: Path, name: str):
    words = (
        *STRATEGIES[name],
        "ckpts",
        "--task",
        "mine.py",
        "-o",
        "out",
        "--json",
        "--keep",
        "n_seen",
        "--keep",
        "*.bias",
    )
    done = run(*words)
    assert done.returncode == 0, done.stderr
    report, written = json.loads(done.stdout), load_file(ckpts.parent / "out")
    weights = [one["coefficient"] for one in report["candidates"]]
    last = max(i for i, c in enumerate(weights, 1) if any(c if isinstance(c, list) else [c]))
    assert report["output"]["not_averaged"] == ["fc.bias", "n_seen", "count"]
    for tensor in ("fc.bias", "n_seen", "count"):
        assert written[tensor].equal(state(last)[tensor])
    assert run("verify", "out", "--sources", "ckpts").returncode == 0
    scored = json.loads(run("eval", "out", "--task", "mine.py", "--json").stdout)
    assert scored["files"][0]["val"]["loss"] == report["scores"]["val"]["loss"]
    if name != "best" and not done.stdout.count('"bits": 4'):  # what was searched is what was written
        assert not any("misjudged" in warning for warning in report["warnings"])


def test_average_overrides_keep_and_python_has_both(ckpts: Path, tmp_path: Path):
    result = ckptavg.swa(ckpts, output=tmp_path / "a", keep=["n_seen", "fc.*"], average=["fc.weight"])
    assert result.output is not None and list(result.output.not_averaged) == ["fc.bias", "n_seen", "count"]
    record = json.loads(_metadata(tmp_path / "a")["ckptavg"])
    assert record["keep"] == ["n_seen", "fc.*"] and record["average"] == ["fc.weight"]
    assert record["not_averaged"] == ["fc.bias", "n_seen", "count"]
    with pytest.raises(UsageError, match="n_sen matches no tensor") as caught:
        ckptavg.swa(ckpts, output=tmp_path / "b", keep=["n_sen"])
    assert caught.value.hint == "names like it: n_seen"
    with pytest.raises(UsageError, match="count: dtype I64 cannot be averaged exactly"):
        ckptavg.swa(ckpts, output=tmp_path / "b", average=["count"])
    with pytest.raises(UsageError, match="leaves no tensor to average"):
        ckptavg.swa(ckpts, output=tmp_path / "b", keep=["*"])
    with pytest.raises(UsageError, match="do not go with --adapter exact"):
        ckptavg.swa(ckpts, output=tmp_path / "b", keep=["n_seen"], adapter="exact")


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_configuration_file_and_the_environment_set_several_patterns(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "ckptavg.toml").write_text('keep = ["n_seen", "fc.bias"]\n')
    by_file = json.loads(run("swa", "ckpts", "-o", "a", "--json").stdout)
    (tmp_path / "ckptavg.toml").unlink()
    by_variable = json.loads(run("swa", "ckpts", "-o", "b", "--json", CKPTAVG_KEEP="n_seen fc.bias").stdout)
    assert by_file["output"]["not_averaged"] == by_variable["output"]["not_averaged"] == ["fc.bias", "n_seen", "count"]


def test_the_loss_at_coefficients_does_not_depend_on_what_was_scored_before(ckpts: Path, tmp_path: Path):
    """A resumed run takes scores from its journal, so integers and kept tensors must not be those scored last."""
    from ckptavg.checkpoints.discover import discover
    from ckptavg.checkpoints.kept import keeping
    from ckptavg.coefficients import Coefficients
    from ckptavg.context import Run as Context
    from ckptavg.objective.mixture import Mixture
    from ckptavg.tasks.python_file import PythonTask

    with discover([ckpts]) as found:
        values: list[Tensor] = []
        for scored in (False, True):
            kept = keeping(found.checkpoints, ["n_seen"])
            mixture = Mixture(PythonTask(str(tmp_path / "mine.py")), kept, Context(device=torch.device("cpu")))
            if scored:
                mixture.score(Coefficients.uniform([0], 5))
            assert mixture.losses is not None
            values.append(mixture.losses.loss(mixture.losses.uniform()))
            state_dict = mixture.mixed.model.state_dict()
            assert float(state_dict["n_seen"]) == 500 and int(state_dict["count"]) == 5
        assert values[0] == values[1]
