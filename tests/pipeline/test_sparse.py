"""Sparse buffers, such as the adjacency of a graph: dense in the output, in the model's layout for its scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from torch import Tensor

from ckptavg.checkpoints import state_dict

TASK = """
import warnings
import torch
from torch import nn

warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta")

class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("adj", torch.eye(5)[:, torch.tensor([1, 0, 3, 2, 4])].{layout})

    def forward(self, x):
        return self.fc(torch.stack([self.adj @ example for example in x]).relu()).mean(1)

def model(): return Graph()
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
def val_dataloader():
    x = torch.randn(20, 5, 3, generator=torch.Generator().manual_seed(0))
    return [(part, (part[:, 0, 0] > 0).long()) for part in x.split(10)]
train_dataloader = val_dataloader
"""
ADJ = torch.tensor([[0, 1.5, 0, 0, 0], [2, 0, 0, 0, 0], [0, 0, 0, -3, 0], [0, 0, 0.5, 0, 0], [0, 0, 0, 0, 4]])
LAYOUTS = ("to_sparse()", "to_sparse_csr()")


def state(step: int, layout: str = "to_sparse()", adj: Tensor = ADJ) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(step)
    sparse = adj.to_sparse() if layout == "to_sparse()" else adj.to_sparse_csr()
    return {"fc.weight": torch.randn(3, 3, generator=draws), "fc.bias": torch.randn(3, generator=draws), "adj": sparse}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Write checkpoints, and a task whose model has a buffer of other values in the same layout."""
    (tmp_path / "ckpts").mkdir()
    for step in range(1, 6):
        torch.save(state(step, request.param), tmp_path / "ckpts" / f"step-{step}.pt")
    (tmp_path / "mine.py").write_text(TASK.replace("{layout}", request.param))
    return request.param


def namespace(tmp_path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec((tmp_path / "mine.py").read_text(), names)
    return names


def loss_of(names: dict[str, Any], state: dict[str, Tensor]) -> float:
    model = names["model"]()
    model.load_state_dict(state)
    with torch.no_grad():
        return float(torch.cat([names["loss"](model, batch) for batch in names["val_dataloader"]()]).mean())


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize(
    "words",
    [("swa",), ("soup",), ("twa", "--epochs", 2), ("twa", "--solver", "quadratic"), ("sewa", "--k", 2, "--bits", 4)],
    ids=lambda words: " ".join(map(str, words)),
)
def test_the_output_is_dense_loads_by_the_line_printed_and_is_scored_as_it_loads(
    run: Run, tmp_path: Path, layout: str, words: tuple[Any, ...]
):
    done = run(words[0], "ckpts", "--task", "mine.py", "-o", "out", *words[1:], "--json")
    assert done.returncode == 0, done.stderr
    output, lines = load_file(tmp_path / "out"), " ".join(done.stderr.split())
    assert output["adj"].equal(ADJ)
    line = re.search(r"adj is sparse, and dense in the output: (.*?) before load_state_dict", lines)
    assert line, lines
    exec(line[1], {"state": output})
    scored = json.loads(done.stdout)["scores"]["val"]["loss"]
    assert scored == pytest.approx(loss_of(namespace(tmp_path), output), rel=1e-6)
    assert run("verify", "out", "--sources", "ckpts").returncode == 0
    assert run("eval", "out", "ckpts/step-1.pt", "--task", "mine.py").returncode == 0


def test_one_that_differs_is_averaged_as_dense_or_kept_where_a_model_is_scored(run: Run, tmp_path: Path):
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "mine.py").write_text(TASK.replace("{layout}", "to_sparse()"))
    for step in range(1, 4):
        torch.save(state(step, adj=step * ADJ.roll(step, 0)), tmp_path / "ckpts" / f"step-{step}.pt")
    assert run("swa", "ckpts", "-o", "out").returncode == 0
    mean = torch.stack([step * ADJ.roll(step, 0).double() for step in range(1, 4)]).mean(0)
    torch.testing.assert_close(load_file(tmp_path / "out")["adj"], mean.float(), rtol=1e-6, atol=0)
    refused = run("swa", "ckpts", "--task", "mine.py", "-o", "kept")
    assert refused.returncode == 2 and "hint: --keep 'adj' takes that of the last" in refused.stderr
    done = run("swa", "ckpts", "--task", "mine.py", "-o", "kept", "--keep", "adj")
    assert done.returncode == 0 and load_file(tmp_path / "kept")["adj"].equal(3 * ADJ.roll(3, 0)), done.stderr


def test_one_too_large_is_left_out_and_the_model_keeps_its_own(
    run: Run, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(state_dict, "MAX_DENSE", 99)
    done = run("soup", "ckpts", "--task", "mine.py", "-o", "out", "--json")
    assert done.returncode == 0 and "left out adj: sparse, and" in " ".join(done.stderr.split()), done.stderr
    output, names = load_file(tmp_path / "out"), namespace(tmp_path)
    own = names["model"]().state_dict()["adj"]
    scored = json.loads(done.stdout)["scores"]["val"]["loss"]
    assert output.keys() == {"fc.weight", "fc.bias"}
    assert scored == pytest.approx(loss_of(names, output | {"adj": own}), rel=1e-6)
    assert run("verify", "out", "--sources", "ckpts").returncode == 0
