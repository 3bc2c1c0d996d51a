"""The measured plane against weights computed by hand, and the files that are written."""

from __future__ import annotations

import json
import re
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import nn

import ckptavg
from ckptavg.errors import UsageError
from ckptavg.report import picture
from ckptavg.tasks.python_file import PythonTask
from ckptavg.tasks.sampled import Sampled

TINY = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
def model(): return nn.Linear(3, 2, dtype=torch.float64)
def loss(model, batch): return model(batch[0]).square().mean(dim=1)
def metric(model, batch): raise AssertionError("a landscape consists of losses")
def val_dataloader(): return DataLoader(TensorDataset(x), batch_size=4)
"""
MIXTURES = ("--mixtures", "last,swa,lawa:k=2", "--grid", 5, "--samples", 3)
LANDSCAPE = ("landscape", "ckpts", "--task", "mine.py", *MIXTURES)


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    (tmp_path / "ckpts").mkdir()
    for step in range(1, 6):
        torch.manual_seed(step)
        state = nn.Linear(3, 2, dtype=torch.float64).state_dict()
        save_file(state, tmp_path / "ckpts" / f"step-{step}.safetensors")
    (tmp_path / "mine.py").write_text(TINY)
    return tmp_path / "ckpts"


def test_the_plane_is_that_of_the_weights(run: Run, ckpts: Path, tmp_path: Path):
    done = run(*LANDSCAPE, "--examples", 12, "-o", "x.json")
    assert done.returncode == 0, done.stderr
    plane = json.loads((tmp_path / "x.json").read_text())["plane"]
    files = [load_file(ckpts / f"step-{step}.safetensors") for step in range(1, 6)]
    weights = torch.stack([torch.cat([file["weight"].flatten(), file["bias"]]) for file in files])
    corners = [weights[4], weights.mean(dim=0), weights[3:].mean(dim=0)]
    basis, _ = torch.linalg.qr(torch.stack([corners[1] - corners[0], corners[2] - corners[0]]).T)
    basis = basis * torch.sign(basis.T @ (corners[1] - corners[0]))[[0, 0]]
    basis[:, 1] *= torch.sign(basis[:, 1] @ (corners[2] - corners[0]))
    for mark, vector in zip(plane["mixtures"] + plane["candidates"], [*corners, *weights], strict=True):
        expected = basis.T @ (vector - corners[0])
        assert (mark["x"], mark["y"]) == pytest.approx(expected.tolist(), abs=1e-9)
        off = vector - corners[0] - basis @ expected
        assert mark["distance"] == pytest.approx(float(off.norm()), abs=1e-6)
    # every third of ten batches of four: 40 / 12 rounds to 3
    x = PythonTask(str(tmp_path / "mine.py"))._module.x.view(10, 4, 3)[::3].reshape(-1, 3)
    assert (plane["examples"], plane["of"]) == (16, 40)

    def loss(vector: torch.Tensor) -> float:
        return float((x @ vector[:6].view(2, 3).T + vector[6:]).square().mean())

    assert [mark["loss"] for mark in plane["mixtures"]] == pytest.approx([loss(vector) for vector in corners])
    points = [loss(corners[0] + basis @ torch.tensor([u, v]).double()) for v, u in product(plane["y"], plane["x"])]
    assert [loss for row in plane["losses"] for loss in row] == pytest.approx(points)
    steps = {round(b - a, 9) for side in (plane["x"], plane["y"]) for a, b in pairwise(side)}
    assert len(steps) == 1 and max(len(plane["x"]), len(plane["y"])) == 5
    for mark in plane["mixtures"] + plane["candidates"]:
        assert plane["x"][0] < mark["x"] < plane["x"][-1] and plane["y"][0] < mark["y"] < plane["y"][-1]


@pytest.mark.parametrize("name", ["landscape.json", "landscape.png"])
def test_a_landscape_replaces_no_file_unasked(run: Run, ckpts: Path, tmp_path: Path, name: str):
    (tmp_path / name).write_text("precious")
    refused = run(*LANDSCAPE)
    assert refused.returncode == 6 and f"{name}: exists already" in refused.stderr
    assert (tmp_path / name).read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"ckpts", "mine.py", name}
    done = run(*LANDSCAPE, "--force")
    assert (done.returncode, done.stdout) == (0, "landscape.json\n"), done.stderr
    assert re.findall(r"^wrote (\S+):", done.stderr, re.MULTILINE) == ["landscape.json", "landscape.png"]
    assert (tmp_path / name).read_bytes() != b"precious"


def test_the_suffix_says_what_is_written(run: Run, ckpts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, head in (("x.svg", b"<?xml"), ("x.pdf", b"%PDF"), ("x.png", b"\x89PNG")):
        done = run(*LANDSCAPE, "-o", name)
        assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr
        assert (tmp_path / name).read_bytes().startswith(head) and not (tmp_path / "x.json").exists()
    done = run(*LANDSCAPE, "-o", "new/")
    assert done.stdout == "new/landscape.json\n" and (tmp_path / "new" / "landscape.png").is_file()
    refused = run(*LANDSCAPE, "-o", "x.jpg")
    assert refused.returncode == 2 and ".json for numbers, or .png, .svg or .pdf" in refused.stderr
    refused = run(*LANDSCAPE[:4], "-o", "y.png")
    assert refused.returncode == 2 and "hint: --mixtures last,swa,soup" in refused.stderr
    monkeypatch.setattr(picture, "available", lambda: False)
    refused = run(*LANDSCAPE, "-o", "y.png")
    assert refused.returncode == 2 and "pip install 'ckptavg[plot]'" in refused.stderr
    done = run(*LANDSCAPE, "-o", "other/")
    assert "no picture was drawn" in done.stderr and not (tmp_path / "other" / "landscape.png").exists()
    assert run("landscape", "ckpts", "--task", "none.py", "-o", "gone/").returncode == 2
    assert not (tmp_path / "gone").exists()


def test_three_averages_on_a_line_span_no_plane(run: Run, ckpts: Path, tmp_path: Path):
    for names in ("last,swa,lawa:k=1", "last,lawa:k=1,swa"):
        refused = run("landscape", "ckpts", "--task", "mine.py", "--mixtures", names)
        assert refused.returncode == 2 and f"--mixtures {names}: these three averages lie on a line" in refused.stderr
    refused = run("landscape", "ckpts", "--task", "mine.py", "--mixtures", "last,swa,swa")
    assert refused.returncode == 2 and "names a strategy twice" in refused.stderr


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ({"hessian": "x"}, "--hessian must be one of auto, exact, gauss-newton, not x"),
        ({"mixtures": "last,swa"}, "--mixtures takes three strategies"),
        ({"mixtures": "last,swa,sop"}, "there is no strategy 'sop'"),
        ({"samples": 2}, "--samples must be at least 3"),
        ({"grid": 1}, "--grid must be at least 3"),
        ({"examples": 0}, "--examples must be at least 1"),
    ],
)
def test_a_wrong_setting_is_a_usage_error_in_python_too(ckpts: Path, setting: dict[str, object], part: str):
    with pytest.raises(UsageError, match=re.escape(part)):
        ckptavg.landscape(ckpts, task=str(ckpts.parent / "mine.py"), output=ckpts.parent / "x.json", **setting)


def test_a_sample_is_spread_evenly_over_the_batches(ckpts: Path):
    task = PythonTask(str(ckpts.parent / "mine.py"))
    whole = [batch[0] for batch, _ in task.sized_batches("val")]
    for examples, every in ((1, 40), (10, 4), (13, 3), (27, 1), (40, 1), (1000, 1)):
        sample = [batch[0] for batch, _ in Sampled(task, examples).sized_batches("val")]
        assert torch.equal(torch.cat(sample), torch.cat(whole[::every]))
