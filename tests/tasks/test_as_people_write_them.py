"""Tasks as people write them: what their functions do to the model, their batches and their loaders.

Figures are compared with an evaluation of the written file in plain PyTorch.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import task as demo
import torch
from safetensors.torch import load_file
from torch import nn

import ckptavg
from ckptavg.checkpoints.discover import discover
from ckptavg.context import Run as Context
from ckptavg.errors import TaskError
from ckptavg.objective.mixture import Mixture
from ckptavg.report.result import Result
from ckptavg.tasks.python_file import PythonTask

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
import task as demo
from task import model, train_dataloader, val_dataloader
def loss(model, batch): return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
def metric(model, batch): return (model(batch[0]).argmax(1) == batch[1]).float()
"""


def written(folder: Path, code: str) -> str:
    path = folder / "people.py"
    path.write_text(HEAD + code)
    return str(path)


def averaged(tmp_path: Path, digits: Path, code: str = "", strategy: str = "swa", **options: object) -> Result:
    run = getattr(ckptavg, strategy)
    options = {"last": 4} | options
    return run(
        [digits], task=written(tmp_path, code), output=tmp_path / f"{strategy}.safetensors", force=True, **options
    )


@torch.no_grad()
def evaluated(path: Path) -> tuple[float, float]:
    """Return loss and accuracy of a file on the demo's validation data, in plain PyTorch."""
    model = demo.model().eval()
    model.load_state_dict(load_file(path))
    x, y = (torch.cat(parts) for parts in zip(*demo.val_dataloader(), strict=True))
    logits = model(x)
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def figures(result: Result) -> tuple[float | None, float | None]:
    return result.scores["val"].loss, result.scores["val"].metric


# ------------------------------------------------------------------ modes

PLAIN = ""
MODES = {
    "eval before the loss": 'def loss(m, b): m.eval(); return F.cross_entropy(m(b[0]), b[1], reduction="none")',
    "eval, then train": "def loss(m, b):\n m.eval(); l = F.cross_entropy(m(b[0]), b[1]); m.train(); return l",
    "eval of a part": "def loss(m, b):\n [p.eval() for p in m.children()]\n return F.cross_entropy(m(b[0]), b[1])",
    "flags set by hand": "def loss(m, b):\n for p in m.modules(): p.training = False\n"
    " return F.cross_entropy(m(b[0]), b[1])",
    "a metric that ends in train": "def metric(m, b):\n m.eval(); r = (m(b[0]).argmax(1) == b[1]).float()\n"
    " m.train(); return r",
    "a metric in train mode": "def metric(m, b):\n r = (m.eval()(b[0]).argmax(1) == b[1]).float()\n"
    " m.train(); m(b[0]); return r",
    "frozen": "def metric(m, b):\n m.requires_grad_(False); m.zero_grad()\n"
    " return (m(b[0]).argmax(1) == b[1]).float()",
    "hooks": "def metric(m, b):\n m.register_forward_hook(lambda q, i, o: o.roll(1, 1))\n"
    " return (m(b[0]).argmax(1) == (b[1] + 1) % 10).float()",
    "a buffer": "def metric(m, b):\n r = (m(b[0]).argmax(1) == b[1]).float()\n"
    " for p in m.buffers(): p.zero_()\n return r",
    "a new buffer": "def metric(m, b):\n r = (m(b[0]).argmax(1) == b[1]).float()\n"
    " for p in m.modules():\n  if 'running_var' in p._buffers: p.running_var = p.running_var * 9\n return r",
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["swa", "sewa", "twa"])
@pytest.mark.parametrize("name", MODES)
def test_the_answer_and_its_figures_do_not_depend_on_what_a_function_does_to_the_model(
    tmp_path: Path, digits: Path, name: str, strategy: str
):
    settings: dict[str, object] = {"sewa": {"k": 2, "steps": 8}, "twa": {"epochs": 1}}.get(strategy, {})
    plain = averaged(tmp_path, digits, PLAIN, strategy, **settings)
    result = averaged(tmp_path, digits, MODES[name], strategy, **settings)
    assert result.output is not None
    expected = evaluated(result.output.path)
    assert figures(result) == pytest.approx(expected, rel=1e-5)
    assert figures(result) == pytest.approx(figures(plain), rel=1e-5)
    for ours, theirs in zip(result.candidates, plain.candidates, strict=True):
        assert ours.coefficient == pytest.approx(theirs.coefficient, abs=1e-5)


EVALUATE = '''
import random, numpy
from tqdm import tqdm
class Digits(Dataset):
    def __init__(self): self.x, self.y = (torch.cat(p) for p in zip(*demo.val_dataloader()))
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return {"index": i, "inputs": self.x[i], "labels": self.y[i]}
def val_dataloader(): return DataLoader(Digits(), batch_size=96)
@torch.no_grad()
def evaluate(model, loader):
    """The function of a training script."""
    torch.manual_seed(0); random.seed(0); numpy.random.seed(0)
    model.eval()
    losses, right = [], []
    for batch in tqdm(loader, disable=None):
        batch = {k: v.to("cpu") for k, v in batch.items()}
        logits = model(batch["inputs"])
        losses.append(F.cross_entropy(logits, batch["labels"], reduction="none"))
        right.append((logits.argmax(1) == batch["labels"]).float())
    model.train()
    return torch.cat(losses), torch.cat(right)
def train_dataloader():
    for x, y in demo.train_dataloader(): yield {"index": torch.arange(len(y)), "inputs": x, "labels": y}
def loss(model, batch): return evaluate(model, [batch])[0]
def metric(model, batch): return evaluate(model, [batch])[1]
'''


@pytest.mark.parametrize("strategy", ["soup", "aswa", "best"])
def test_a_copy_of_a_training_scripts_evaluate_gives_the_figures_of_an_independent_evaluation(
    tmp_path: Path, digits: Path, strategy: str
):
    result = averaged(tmp_path, digits, EVALUATE, strategy)
    assert result.output is not None and not [w for w in result.warnings if "examples" in w]
    assert figures(result) == pytest.approx(evaluated(result.output.path), rel=1e-5)
    assert figures(result) == pytest.approx(figures(averaged(tmp_path, digits, PLAIN, strategy)), rel=1e-5)


@pytest.mark.parametrize("function", ["loss", "metric"])
def test_a_function_that_runs_the_model_in_training_mode_is_a_warning(tmp_path: Path, digits: Path, function: str):
    part = f"def {function}(m, b): m[1].eval(); [p.train() for p in m if isinstance(p, nn.ReLU)]; return "
    values = {"loss": "F.cross_entropy(m(b[0]), b[1])", "metric": "(m(b[0]).argmax(1) == b[1]).float()"}
    code = f"def {function}(m, b): m.train(); return {values[function]}"
    for trained in (code, part + values[function]):
        assert [w for w in averaged(tmp_path, digits, trained).warnings if "a part of it in training mode" in w]
    for fine in (f"def {function}(m, b): m.eval(); r = {values[function]}; m.train(); return r", ""):
        assert not [w for w in averaged(tmp_path, digits, fine).warnings if "training mode" in w]


def test_batchnorm_statistics_that_a_copy_of_the_model_took_are_an_error_that_names_the_function(
    tmp_path: Path, digits: Path
):
    code = 'import copy\ndef loss(m, b): return F.cross_entropy(copy.deepcopy(m)(b[0]), b[1], reduction="none")'
    with pytest.raises(TaskError, match=r"loss\(\) ran BatchNorm layer"):
        averaged(tmp_path, digits, code)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_gradient_through_a_buffer_that_the_loss_updates_is_right(tmp_path: Path):
    """A layer that updates a scale and divides by it: autograd saves the new value."""
    code = """
class Net(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(3, 4); self.register_buffer("scale", torch.ones(4))
    def forward(self, x): self.scale.mul_(0.5); return self.a(x) / self.scale
def model(): return Net()
def val_dataloader(): return DataLoader(TensorDataset(torch.randn(40, 3), torch.arange(40) % 4), 40)
del train_dataloader
"""
    model = nn.Linear(3, 4)
    for i in (1, 2):
        nn.init.normal_(model.weight)
        state = {f"a.{name}": x for name, x in model.state_dict().items()} | {"scale": torch.ones(4)}
        torch.save(state, tmp_path / f"step-{i}.pt")
    torch.manual_seed(0)
    task = PythonTask(written(tmp_path, code))
    with discover([tmp_path / "step-1.pt", tmp_path / "step-2.pt"]) as found:
        mixture = Mixture(task, found.checkpoints, Context(device=torch.device("cpu")))
        c = mixture.losses.uniform().requires_grad_()  # pyright: ignore
        mixture.losses.loss(c).backward()  # pyright: ignore
        x, y = next(iter(task.batches("val")))
        weights = [checkpoint_tensors(path) for path in sorted(tmp_path.glob("step-*.pt"))]
        d = torch.full((2,), 0.5, requires_grad=True)
        mixed = {name: d[0] * weights[0][name] + d[1] * weights[1][name] for name in ("a.weight", "a.bias")}
        nn.functional.cross_entropy((x @ mixed["a.weight"].T + mixed["a.bias"]) / 0.5, y).backward()
    assert c.grad is not None and d.grad is not None
    torch.testing.assert_close(c.grad.float(), d.grad, rtol=1e-4, atol=1e-6)


def test_statistics_of_a_layer_that_the_loss_does_not_run_are_averaged_and_named(tmp_path: Path):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "aux": nn.BatchNorm1d(4)})
    for i in (1, 2):
        nn.init.normal_(model["body"][0].weight)  # pyright: ignore
        model["aux"].running_mean.fill_(i)  # pyright: ignore
        torch.save(model.state_dict(), tmp_path / f"step-{i}.pt")
    code = """
class Net(nn.ModuleDict):
    def forward(self, x): return self.body(x)
def model(): return Net({"body": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "aux": nn.BatchNorm1d(4)})
def val_dataloader(): return DataLoader(TensorDataset(torch.randn(40, 3), torch.arange(40) % 4), batch_size=20)
del train_dataloader
"""
    result = ckptavg.swa([tmp_path], task=written(tmp_path, code), output=tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["aux.running_mean"].tolist() == [1.5] * 4
    assert "loss() does not run aux: the average of their statistics stays there" in result.warnings


DERIVED = {
    "cached in eval mode": """
class Product(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(3, 5, bias=False); self.b = nn.Linear(5, 4, bias=False)
    def train(self, mode=True):
        super().train(mode)
        if not mode: self.whole = (self.b.weight @ self.a.weight).detach()
        return self
    def forward(self, x): return self.b(self.a(x)) if self.training else x @ self.whole.T
""",
    "merged in eval mode": """
class Product(nn.Module):
    def __init__(self):
        super().__init__(); self.a = nn.Linear(3, 5, bias=False); self.b = nn.Linear(5, 4, bias=False)
        self.merged = False
    def train(self, mode=True):
        super().train(mode)
        if not mode and not self.merged: self.b.weight.data *= 2
        if mode and self.merged: self.b.weight.data /= 2
        self.merged = not mode
        return self
    def forward(self, x): return self.b(self.a(x)) * (1 if self.merged else 2)
""",
}


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("kind", DERIVED)
def test_weights_derived_in_eval_mode_are_noticed_before_a_file_is_written(tmp_path: Path, kind: str, same: bool):
    """Also if ``model()`` returns the same object in each call."""
    for i in (1, 2, 3):
        torch.manual_seed(i)
        state = {"a.weight": torch.randn(5, 3), "b.weight": torch.randn(4, 5)}
        torch.save(state, tmp_path / f"step-{i}.pt")
    code = DERIVED[kind] + (
        f"one = Product()\ndef model(): torch.manual_seed(9); return {'one' if same else 'Product()'}\n"
        "def val_dataloader(): return DataLoader(TensorDataset(torch.randn(40, 3), torch.arange(40) % 4), 20)\n"
        "del train_dataloader\n"
    )
    with pytest.raises(TaskError, match=r"in a fresh model,") as caught:
        ckptavg.soup([tmp_path], task=written(tmp_path, code), output=tmp_path / "out.safetensors")
    assert caught.value.hint and "forward()" in caught.value.hint
    assert not (tmp_path / "out.safetensors").exists()


# ------------------------------------------------------------------ batches

BATCHES = {
    "a dataclass": "@dataclass\nclass Batch:\n  x: object\n  y: object",
    "an object with to": "class Batch:\n  def __init__(self, x, y): self.x, self.y = x, y\n"
    "  def to(self, device): return self",
    "graphs": "class Batch:\n  def __init__(self, x, y):\n"
    "    self.x, self.y, self.edges, self.num_graphs = x, y, torch.zeros(2, 7), len(y)\n"
    "  def to(self, device): return self\n  def __len__(self): return 3",
    "an object with batch_size": "class Batch:\n"
    "  def __init__(self, x, y): self.x, self.y, self.e, self.batch_size = x, y, torch.zeros(2, 7), len(y)",
}  # fmt: skip
WRAPPED = """
from dataclasses import dataclass
{batch}
def _collate(rows): x, y = zip(*rows); return Batch(torch.stack(x), torch.stack(y))
def _loader(data, size=64): return DataLoader(data, batch_size=size, collate_fn=_collate)
def val_dataloader(): return _loader(TensorDataset(*(torch.cat(p) for p in zip(*demo.val_dataloader()))))
def train_dataloader(): return _loader(TensorDataset(*(torch.cat(p) for p in zip(*demo.train_dataloader()))))
def loss(m, b): return F.cross_entropy(m(b.x), b.y)
def metric(m, b): return (m(b.x).argmax(1) == b.y).float().mean()
"""


@pytest.mark.parametrize("kind", BATCHES)
def test_examples_of_any_batch_are_counted(tmp_path: Path, digits: Path, kind: str):
    result = averaged(tmp_path, digits, WRAPPED.replace("{batch}", BATCHES[kind]))
    assert result.output is not None
    assert result.scores["val"].examples == sum(len(y) for _, y in demo.val_dataloader())
    assert figures(result) == pytest.approx(evaluated(result.output.path), rel=1e-5)  # the last batch is smaller
    plain = averaged(tmp_path, digits)
    assert result.cost and plain.cost and result.cost.epochs == pytest.approx(plain.cost.epochs)


UNCLEAR = """
def val_dataloader():
    for x, y in demo.val_dataloader(): yield {"classes": torch.arange(10), "x": x, "y": y}
def train_dataloader():
    for x, y in demo.train_dataloader(): yield {"classes": torch.arange(10), "x": x, "y": y}
def loss(m, b): return F.cross_entropy(m(b["x"]), b["y"])
def metric(m, b): return (m(b["x"]).argmax(1) == b["y"]).float()
"""


def test_an_unclear_number_of_examples_is_asked_for(tmp_path: Path, digits: Path):
    with pytest.raises(TaskError, match=r"number of examples of a batch \(a dict\) is unclear") as caught:
        averaged(tmp_path, digits, UNCLEAR)
    assert caught.value.hint and "def batch_size(batch)" in caught.value.hint
    result = averaged(tmp_path, digits, UNCLEAR + 'def batch_size(batch): return len(batch["y"])')
    assert result.scores["val"].examples == sum(len(y) for _, y in demo.val_dataloader())
    assert figures(result) == pytest.approx(figures(averaged(tmp_path, digits)), rel=1e-5)


def test_a_pass_that_counts_other_examples_than_the_dataset_has_is_a_warning(tmp_path: Path, digits: Path):
    code = "data = TensorDataset(*(torch.cat(p) for p in zip(*demo.val_dataloader())))\n"
    code += "def val_dataloader(): return DataLoader(data, batch_size=64{})"
    doubled = code.format(", collate_fn=lambda rows: [torch.stack([r[i] for r in rows + rows]) for i in (0, 1)]")
    total = sum(len(y) for _, y in demo.val_dataloader())
    with pytest.raises(TaskError, match=r"they allow 128, and its loader is set to 64, for batch 1 of val_dataloader"):
        averaged(tmp_path, digits, doubled)
    counts = f"val_dataloader(): a pass has {2 * total} examples, but its dataset {total}"
    doubled += "\ndef batch_size(batch): return torch.tensor(len(batch[1]))"
    assert any(warning.startswith(counts) for warning in averaged(tmp_path, digits, doubled).warnings)
    for fine in ("", ", drop_last=True", ", shuffle=True", ", sampler=range(100)"):
        assert not [w for w in averaged(tmp_path, digits, code.format(fine)).warnings if "examples" in w]


UNUSUAL = {
    "uncollated lists": ("collate_fn=lambda rows: rows", "torch.stack([r[0] for r in b])",
                         "torch.stack([r[1] for r in b])"),
    "time-major": ("collate_fn=lambda rows: (torch.stack([r[0] for r in rows], 1), torch.stack([r[1] for r in rows]))",
                   "b[0].transpose(0, 1)", "b[1]"),
    "a table beside": ("collate_fn=lambda rows: {'grid': torch.arange(64), 'x': torch.stack([r[0] for r in rows]), "
                       "'y': torch.stack([r[1] for r in rows])}", "b['x']", "b['y']"),
    "a record with a constructor": ("collate_fn=lambda rows: Record(torch.stack([r[0] for r in rows]) * 16, "
                                    "torch.stack([r[1] for r in rows]))", "b.x", "b.y"),
    "a mapping with attributes": ("collate_fn=lambda rows: Keys(x=torch.stack([r[0] for r in rows]), "
                                  "y=torch.stack([r[1] for r in rows]))", "b.x", "b.y"),
}  # fmt: skip
UNUSUAL_TASK = """
from dataclasses import dataclass
@dataclass(slots=True)
class Record:
  x: object
  y: object
  def __post_init__(self): self.x = self.x / 16
class Keys(dict):
  __getattr__ = dict.__getitem__
data = TensorDataset(*(torch.cat(p) for p in zip(*demo.val_dataloader())))
def val_dataloader(): return DataLoader(data, 64, OPTIONS)
more = TensorDataset(*(torch.cat(p) for p in zip(*demo.train_dataloader())))
def train_dataloader(): return DataLoader(more, 64, OPTIONS)
def loss(m, b): return F.cross_entropy(m(X.reshape(-1, *data[0][0].shape)), Y)
def metric(m, b): return (m(X.reshape(-1, *data[0][0].shape)).argmax(1) == Y).float().mean()
"""


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_smaller_last_batch_of_an_unusual_kind_is_counted(tmp_path: Path, digits: Path, kind: str):
    """There are numbers of examples beside the batch's: rows of an image, and a table of 64 rows."""
    options, x, y = UNUSUAL[kind]
    result = averaged(tmp_path, digits, UNUSUAL_TASK.replace("OPTIONS", options).replace("X", x).replace("Y", y))
    assert result.output is not None and not [w for w in result.warnings if "examples" in w]
    assert result.scores["val"].examples == sum(len(y) for _, y in demo.val_dataloader())
    assert figures(result) == pytest.approx(evaluated(result.output.path), rel=1e-5)


def test_a_loss_that_changes_its_batch_changes_no_other_functions_batch(tmp_path: Path, digits: Path):
    code = 'def loss(m, b): l = F.cross_entropy(m(b[0]), b[1], reduction="none"); b[0].zero_(); b.pop(); return l'
    result = averaged(
        tmp_path, digits, "def val_dataloader():\n for b in demo.val_dataloader(): yield list(b)\n" + code
    )
    assert result.output is not None
    assert figures(result) == pytest.approx(evaluated(result.output.path), rel=1e-5)


# ------------------------------------------------------------------ loaders and costs

RANDOM = """
class Noisy(Dataset):
    def __init__(self): self.x, self.y = (torch.cat(p) for p in zip(*demo.val_dataloader()))
    def __len__(self): return 128
    def __getitem__(self, i): return self.x[i] + {noise}, self.y[i]
def val_dataloader(): return DataLoader(Noisy(), batch_size=64{options})
import ckptavg.batches.cache
"""


@pytest.fixture
def nothing_is_cached(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ckptavg.batches.cache.HOST", 0)


@pytest.mark.usefixtures("nothing_is_cached")
@pytest.mark.parametrize("options", ["", ", num_workers=1", ", num_workers=1, persistent_workers=True"])
def test_passes_of_a_random_dataset_repeat_also_with_persistent_workers(tmp_path: Path, digits: Path, options: str):
    code = RANDOM.replace("{noise}", "torch.randn_like(self.x[i])").replace("{options}", options)
    (tmp_path / "ckpts").mkdir()
    for i in (1, 2, 3):  # equal, but for a number that nothing reads
        state = demo.model().state_dict()
        torch.manual_seed(0)
        state = {name: torch.rand_like(x) if x.is_floating_point() else x + i for name, x in state.items()}
        torch.save(state, tmp_path / "ckpts" / f"step-{i}.pt")
    result = ckptavg.swa([tmp_path / "ckpts"], task=written(tmp_path, code), output=tmp_path / "out.safetensors")
    singles = [candidate.score.loss for candidate in result.candidates if candidate.score]
    assert len(singles) == 3 and len(set(singles)) == 1 and not [w for w in result.warnings if "in every pass" in w]


@pytest.mark.usefixtures("nothing_is_cached")
def test_data_that_differ_between_passes_are_a_warning_that_names_the_loader(tmp_path: Path, digits: Path):
    code = "import os\n" + RANDOM.replace("{noise}", "int.from_bytes(os.urandom(2)) / 2**18").replace("{options}", "")
    result = averaged(tmp_path, digits, code)
    assert [w for w in result.warnings if w.startswith("val_dataloader() gives other examples, or another order")]


FORWARDS = """
import os
def count(*_): os.environ["FORWARDS"] = str(int(os.environ["FORWARDS"]) + 1)
def model():
    m = demo.model()
    m.register_forward_pre_hook(count)
    return m
"""


@pytest.mark.parametrize("strategy", ["soup", "sewa", "aswa", "twa"])
@pytest.mark.parametrize(
    "code", ["", 'def loss(m, b): m(b[0]); return F.cross_entropy(m(b[0]), b[1], reduction="none")']
)
def test_cost_counts_every_forward_pass_of_the_model(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, code: str
):
    monkeypatch.setenv("FORWARDS", "0")
    settings: dict[str, object] = {"sewa": {"k": 2, "steps": 8}, "twa": {"epochs": 1}}.get(strategy, {})
    result = averaged(tmp_path, digits, FORWARDS + code, strategy, **settings)
    assert result.cost and result.cost.forward_batches == int(os.environ["FORWARDS"])


def test_a_loss_that_runs_parts_of_the_model_counts_as_a_pass(tmp_path: Path, digits: Path):
    parts = "def through(m, x):\n for p in m.children(): x = p(x)\n return x\n"
    parts += 'def loss(m, b): return F.cross_entropy(through(m, b[0]), b[1], reduction="none")\n'
    parts += "def metric(m, b): return (through(m, b[0]).argmax(1) == b[1]).float()"
    plain, result = averaged(tmp_path, digits), averaged(tmp_path, digits, parts)
    assert plain.cost and result.cost and 0 <= plain.cost.forward_batches - result.cost.forward_batches <= 2


SHARED = """
def forward(net, batch): return net(batch[0])
def loss(output, batch): return F.cross_entropy(output, batch[1], reduction="none")
def metric(output, batch): return (output.argmax(1) == batch[1]).float()
def predict(output, batch): return output.softmax(1)
"""


@pytest.mark.parametrize(("strategy", "settings"), [
    ("soup", {}), ("sewa", {"k": 2, "steps": 4}), ("sewa", {"k": 2, "solver": "quadratic"}), ("twa", {"epochs": 1}),
])  # fmt: skip
def test_a_shared_forward_gives_the_same_file_at_one_pass_a_batch(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, settings: dict[str, object]
):
    predict = "def predict(m, b): return m(b[0]).softmax(1)"
    apart = averaged(tmp_path, digits, predict, strategy, **settings)
    monkeypatch.setenv("FORWARDS", "0")
    shared = averaged(tmp_path, digits, FORWARDS + SHARED, strategy, **settings)
    assert apart.output and shared.output and apart.cost and shared.cost
    assert shared.output.data_digest == apart.output.data_digest  # the same operations in the same order
    assert shared.scores["val"].figures == apart.scores["val"].figures
    forward_mode = 12 if "solver" in settings else 0  # counted as well, three batches along four candidates
    assert int(os.environ["FORWARDS"]) + forward_mode == shared.cost.forward_batches
    assert shared.cost.forward_batches < apart.cost.forward_batches


@pytest.mark.parametrize(("code", "message"), [
    ("def loss(net, b): return net.sum()", r"loss\(net, b\) takes the model, but it gets the result of forward\(\)"),
    ("def metric(net, b): return net.sum()", r"metric\(net, b\) takes the model"),
    ("def forward(x): return x", r"forward\(\) must take \(model, batch\), not \(x\)"),
])  # fmt: skip
def test_a_function_that_takes_the_model_beside_forward_is_refused(tmp_path: Path, code: str, message: str):
    with pytest.raises(TaskError, match=message):
        PythonTask(written(tmp_path, SHARED + code))


@pytest.mark.parametrize(("code", "message"), [
    ("def loss(o, b): return F.cross_entropy(o.mul_(2), b[1])", r"loss\(\) changes the result of forward\(\) in place"),
    ("def forward(m, b): return m(b[0], 1)", r"in forward, batch 1 of train_dataloader: TypeError"),
    ("def forward(m, b): return m(b[0]).detach()", r"loss\(\) has no gradient"),
])  # fmt: skip
def test_errors_of_a_shared_forward_name_the_function(tmp_path: Path, digits: Path, code: str, message: str):
    strategy = "twa" if "detach" in code else "soup"
    with pytest.raises(TaskError, match=message):
        averaged(tmp_path, digits, SHARED + code, strategy)


def test_what_forward_changes_is_undone_and_its_batch_is_a_copy(tmp_path: Path, digits: Path):
    changes = (
        "def forward(m, b):\n m.train(); m.eval(); out = m(b[0]); m.train(); b[0].zero_(); b[1].zero_()\n return out"
    )
    plain, changed = (averaged(tmp_path, digits, SHARED + code, "soup") for code in ("", changes))
    assert figures(plain) == figures(changed) and not [w for w in changed.warnings if "training mode" in w]
    assert plain.output and changed.output and plain.output.data_digest == changed.output.data_digest


def test_a_torchmetric_gets_the_result_of_forward(tmp_path: Path, digits: Path):
    metric = "from torchmetrics.classification import MulticlassF1Score\nmetric = MulticlassF1Score(10)\n"
    apart = averaged(tmp_path, digits, metric)
    shared = averaged(tmp_path, digits, SHARED.partition("def predict")[0] + metric)
    assert apart.cost and shared.cost and shared.cost.forward_batches < apart.cost.forward_batches
    assert figures(apart) == figures(shared)


@pytest.mark.parametrize("baselines", [True, False])
def test_early_rejection_never_costs_more(tmp_path: Path, digits: Path, baselines: bool):
    bounds = "metric_bounds = (0.0, 1.0)"
    plain, early = (
        averaged(tmp_path, digits, bounds, "aswa", early_reject=early, baselines=baselines, last=12)
        for early in (False, True)
    )
    assert plain.cost and early.cost and early.cost.forward_batches <= plain.cost.forward_batches
    assert (
        plain.output
        and early.output
        and plain.output.data_digest != ""
        and early.candidates[0].coefficient == plain.candidates[0].coefficient
    )
