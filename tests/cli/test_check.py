"""``ckptavg check``: each trap that it can see, in one line with its remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import task as demo
import torch
from conftest import Run
from tasks.test_as_people_write_them import DERIVED, HEAD

ONE_EACH = 'def loss(model, batch): return F.cross_entropy(model(batch[0]), batch[1], reduction="none")\n'
TRAPS = {
    "loss() returns a sum, which grows with the batch": (
        7, 'def loss(m, b): return F.cross_entropy(m(b[0]), b[1], reduction="sum")'
    ),
    "loss() returns a mean: one value per example would give intervals": (
        0, "def loss(m, b): return F.cross_entropy(m(b[0]), b[1])"
    ),
    "metric() returns a sum, which grows with the batch": (
        7, "def metric(m, b): return (m(b[0]).argmax(1) == b[1]).sum()"
    ),
    "metric()['right'] returns a sum, which grows with the batch": (
        0, "def metric(m, b): r = m(b[0]).argmax(1) == b[1]; return {'top1': r, 'right': r.sum()}"
    ),
    "loss() has no gradient": (0, "@torch.no_grad()\n" + ONE_EACH),
    "loss() differs between two calls with the same seeds": (
        7, "calls = [0]\ndef loss(m, b): calls[0] += 1; return F.cross_entropy(m(b[0]), b[1]) + calls[0]"
    ),
    "loss() changes the model (training mode); that is undone after each call": (
        0, 'def loss(m, b): l = F.cross_entropy(m.eval()(b[0]), b[1], reduction="none"); m.train(); return l'
    ),
    "metric() changes the model (buffers, hooks, requires_grad)": (
        0, "def metric(m, b):\n m.requires_grad_(False); m.register_forward_hook(print); r = m(b[0]).sum(1) * 0\n"
        " [p.add_(1) for p in m.buffers()]\n return r"
    ),
    "val_dataloader() gives other examples, or another order, in every pass": (
        0, "import os\ndef val_dataloader():\n"
        " for x, y in demo.val_dataloader(): yield x + int.from_bytes(os.urandom(2)) / 2**16, y"
    ),
    "there is no test data: --holdout 0.5": (0, ""),
    "metric_bounds are not set": (0, ""),
    "there is no training data": (0, "del train_dataloader"),
    "with random numbers (the same ones for every candidate)": (
        0, 'def loss(m, b): return F.cross_entropy(m(b[0] + torch.randn_like(b[0])), b[1], reduction="none")'
    ),
    "a pass has 800 examples, but its dataset 400": (
        0, "data = TensorDataset(*(torch.cat(p) for p in zip(*demo.val_dataloader())))\n"
        "def val_dataloader(): return DataLoader(data, 50, collate_fn=lambda rows: "
        "[torch.stack([r[i] for r in rows + rows]) for i in (0, 1)])\n"
        "def batch_size(b): return len(b[1])"
    ),
}  # fmt: skip


def checked(run: Run, folder: Path, ckpts: Path, code: str, *more: str):
    (folder / "people.py").write_text(HEAD + code)
    return run("check", ckpts, "--task", "people.py", *more)


@pytest.mark.parametrize("line", TRAPS)
def test_each_trap_is_one_line(run: Run, tmp_path: Path, digits: Path, line: str):
    code, text = TRAPS[line]
    done = checked(run, tmp_path, digits, text)
    assert done.returncode == code
    assert len([printed for printed in done.stdout.splitlines() if line in printed]) == 1, done.stdout
    assert ("problem: " in done.stdout) == (code != 0)
    fine = checked(run, tmp_path, digits, "metric_bounds = (0.0, 1.0)\ndef test_dataloader(): return val_dataloader()")
    assert fine.returncode == 0 and line not in fine.stdout and fine.stdout.endswith("The task works.\n")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_task_without_traps_is_described(run: Run, tmp_path: Path, digits: Path):
    done = checked(
        run, tmp_path, digits, "metric_bounds = (0.0, 1.0)\nfrom task import test_dataloader", "--json", "-q"
    )
    found = json.loads(done.stdout)
    sizes = {name: [len(y) for _, y in getattr(demo, f"{name}_dataloader")()] for name in ("val", "test", "train")}
    for name, split in found["splits"].items():
        assert (split["examples"], split["batches"], split["repeats"]) == (sum(sizes[name]), len(sizes[name]), True)
    assert found["loss"] == "one value per example" and found["metric"] == "larger is better, from 0 to 1"
    assert found["candidates"] == 24 and "2 BatchNorm layers" in found["model"]
    assert all(found["searches"][name] > 0 for name in ("best", "soup", "aswa", "sewa", "twa"))
    assert found["remarks"] == found["problems"] == [] and found["splits"]["val"]["forwards"] == 2  # loss and metric
    evaluated = json.loads(run("eval", digits, "--task", "people.py", "--json").stdout)["files"][-1]
    assert abs(found["splits"]["val"]["loss"] - evaluated["val"]["loss"]) < 0.1  # statistics are recomputed here


@pytest.mark.parametrize("kind", DERIVED)
def test_derived_weights_are_a_problem(run: Run, tmp_path: Path, kind: str):
    (tmp_path / "ckpts").mkdir()
    for i in (1, 2):
        torch.manual_seed(i)
        torch.save({"a.weight": torch.randn(5, 3), "b.weight": torch.randn(4, 5)}, tmp_path / "ckpts" / f"step-{i}.pt")
    data = "DataLoader(TensorDataset(torch.randn(40, 3), torch.arange(40) % 4), 20)"
    code = f"def model(): return Product()\ndef val_dataloader(): return {data}\ndel train_dataloader\n"
    done = checked(run, tmp_path, tmp_path / "ckpts", DERIVED[kind] + code)
    assert done.returncode == 7 and "problem: " in done.stdout and "in a fresh model" in done.stderr


DECIDING = {
    "": "larger is better",
    "def top1(m, b): return m(b[0]).amax(1)\nmetric = top1": "top1, larger is better",
    "def metric(m, b): return m(b[0]).amax(1)\nmetric_goal = 'min'": "smaller is better",
    "from torchmetrics.classification import MulticlassAccuracy\nmetric = MulticlassAccuracy(10)": "macro Accuracy, "
    "larger is better",
    "def metric(m, b): return {'a': m(b[0]).amax(1), 'b': m(b[0]).amin(1)}\nmetric_goal = {'b': 'min'}\n"
    "metric_key = 'b'": "b, smaller is better",
    "del metric\ndef predict(m, b): return m(b[0]).softmax(1)\nmetric_key = 'ece'": "ece, smaller is better",
}


@pytest.mark.parametrize("code", DECIDING)
def test_the_deciding_metric_is_named_with_its_goal(run: Run, tmp_path: Path, digits: Path, code: str):
    done = checked(run, tmp_path, digits, code)
    assert done.returncode == 0 and f"metric      {DECIDING[code]}\n" in done.stdout, done.stdout


def test_a_batch_that_has_no_halves_is_checked_without_them(run: Run, tmp_path: Path, digits: Path):
    """As many features as examples, in the first dimension: half of the one is half of the other."""
    code = """
def val_dataloader():
    x, y = next(iter(demo.val_dataloader()))
    return [(x[:64].reshape(64, 64).T.contiguous(), y[:64])] * 2
def shaped(b): return b[0].T.reshape(64, *next(iter(demo.val_dataloader()))[0].shape[1:])
def loss(m, b): return F.cross_entropy(m(shaped(b)), b[1])
def metric(m, b): return (m(shaped(b)).argmax(1) == b[1]).float().mean()
del train_dataloader
"""
    done = checked(run, tmp_path, digits, code)
    assert done.returncode == 0 and "the mean of a batch" in done.stdout, done.stderr


def test_weights_that_forward_caches_are_a_problem(run: Run, tmp_path: Path):
    (tmp_path / "ckpts").mkdir()
    for i in (1, 2):
        torch.manual_seed(i)
        torch.save({"a.weight": torch.randn(5, 3), "b.weight": torch.randn(4, 5)}, tmp_path / "ckpts" / f"step-{i}.pt")
    code = """
class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5, bias=False), nn.Linear(5, 4, bias=False)
        self.merged = None
    def forward(self, x):
        self.merged = self.b.weight @ self.a.weight if self.merged is None else self.merged
        return x @ self.merged.T
def model(): return Lazy()
def val_dataloader(): return DataLoader(TensorDataset(torch.randn(40, 3), torch.arange(40) % 4), 20)
del train_dataloader
"""
    done = checked(run, tmp_path, tmp_path / "ckpts", code)
    assert done.returncode == 7 and "in a fresh model" in done.stderr, done.stdout + done.stderr


def test_an_error_of_the_task_is_that_of_a_run(run: Run, tmp_path: Path, digits: Path):
    done = checked(run, tmp_path, digits, "def loss(m, b): raise ValueError('oops')")
    assert done.returncode == 7 and "in loss" in done.stderr and "oops" in done.stderr
    none = run("check", digits)
    assert none.returncode == 2 and "check needs a task file or --val" in none.stderr
