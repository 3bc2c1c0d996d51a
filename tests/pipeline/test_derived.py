"""Tensors that are functions of others: recomputed, copied from the last candidate, or named; in searches too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.prune import random_unstructured

import ckptavg
from ckptavg.checkpoints.derived import REASONS
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.kept import keeping
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run as Context
from ckptavg.objective.mixture import Mixture
from ckptavg.pipeline.verification import verify
from ckptavg.tasks.python_file import PythonTask

TASK = """
import torch
from torch import nn
from torch.nn.utils.{module} import spectral_norm

def model():
    torch.manual_seed(0)
    layers = [spectral_norm(nn.Linear(a, b)) for a, b in ((4, 16), (16, 16), (16, 16), (16, 1))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Tanh(), layers[3]).double()

def data(seed):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [(part, part[:, :1] * 0.2) for part in x.split(32)]

def loss(model, batch): return ((model(batch[0]) - batch[1]) ** 2).mean(1)
def val_dataloader(): return data(1)
"""


@pytest.fixture(params=["spectral_norm", "parametrizations"])
def ckpts(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Five checkpoints, far apart, of a network in which each layer is spectrally normalised; its task beside them."""
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "mine.py").write_text(TASK.replace("{module}", request.param))
    task = PythonTask(str(tmp_path / "mine.py"))
    model = task.model().train()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(1, 101):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step + 9), dtype=torch.float64)
        optimizer.zero_grad()
        ((model(x) - x[:, :1] * 0.2) ** 2).mean().backward()
        optimizer.step()
        if step % 20 == 0:
            torch.save(model.state_dict(), tmp_path / "ckpts" / f"step-{step}.pt")
    return tmp_path / "ckpts"


def ratios(state: dict[str, Tensor]) -> list[float]:
    """Return σ = uᵀWv of each layer over the largest singular value of its weight, by LAPACK."""
    weights = {name: name.replace("0._u", "original").replace("weight_u", "weight_orig") for name in state}
    layers = [(state[u], state[w], state[f"{u[:-1]}v"]) for u, w in weights.items() if u.endswith("_u")]
    return [float(u @ w @ v / torch.linalg.svdvals(w)[0]) for u, w, v in layers]


SEARCHES = (
    ("swa",), ("soup",), ("swa", "--dtype", "bfloat16"), ("sewa", "--k", 3, "--steps", 5),
    ("sewa", "--k", 3, "--solver", "quadratic"), ("twa", "--epochs", 3, "--lr", 0.1, "--bits", 4),
    ("twa", "--epochs", 3, "--layerwise", "--offload", "disk"),
)  # fmt: skip


@pytest.mark.parametrize("words", SEARCHES, ids=lambda words: " ".join(map(str, words)))
def test_a_search_scores_what_is_written_and_verify_rebuilds_it(run: Run, ckpts: Path, words: tuple[object, ...]):
    done = run(*words, "ckpts", "--task", "mine.py", "-o", "out", "--json")
    assert done.returncode == 0, done.stderr  # a fresh model with the file has the search's score
    report, written = json.loads(done.stdout), load_file(ckpts.parent / "out")
    several = sum(bool(candidate["coefficient"]) for candidate in report["candidates"]) > 1
    assert len(report["output"]["derived"]) == (8 if several else 0)
    if several and report["output"]["dtype"] == "float64":
        assert max(abs(ratio - 1) for ratio in ratios(written)) < 1e-13
    found = verify(ckpts.parent / "out", ckpts)
    assert (found.differ, found.unchecked) == ([], [])


def test_the_gradient_is_that_of_the_loss_with_converged_vectors(ckpts: Path):
    """∂σ/∂W = uvᵀ at the singular vectors, so that constants give the gradient of the loss whose vectors follow W."""
    with discover([ckpts]) as found:
        task = PythonTask(str(ckpts.parent / "mine.py"))
        mixture = Mixture(task, keeping(found.checkpoints, ()), Context(device=torch.device("cpu")))
        assert mixture.losses is not None
        row, h = [0.1, 0.15, 0.2, 0.25, 0.3], 1e-5

        def loss(shift: float) -> float:
            moved = [row[0] + shift, *row[1:4], row[4] - shift]
            scored = mixture.score(Coefficients((tuple(moved),))).loss
            assert scored is not None
            assert max(abs(ratio - 1) for ratio in ratios(mixture.mixed.model.state_dict())) < 1e-13
            return scored

        value, gradient_N = mixture.losses.gradient(Coefficients((tuple(row),)))
        slope = float(gradient_N[0] - gradient_N[4])
        # eight power iterations from the mean's vectors: not converged to the last bit, where the loss is
        assert value == pytest.approx(loss(0.0), rel=1e-4)
        assert slope == pytest.approx((loss(h) - loss(-h)) / (2 * h), rel=1e-3)


def test_a_resumed_search_repeats_the_losses(ckpts: Path):
    """They depend on the coefficients alone, not on the mixtures before, which a journal replaces."""
    values: list[Tensor] = []
    for before in (False, True):
        with discover([ckpts]) as found:
            task = PythonTask(str(ckpts.parent / "mine.py"))
            mixture = Mixture(task, keeping(found.checkpoints, ()), Context(device=torch.device("cpu")))
            assert mixture.losses is not None
            if before:
                mixture.score(Coefficients.uniform([0, 3], 5))
                mixture.losses.loss(torch.tensor([0.9, 0.1, 0, 0, 0], dtype=torch.float64))
                mixture.losses.loss(mixture.losses.uniform())
                mixture.restart()
            values.append(mixture.losses.loss(torch.tensor([0.3, 0, 0.3, 0.4, 0], dtype=torch.float64)))
    assert values[0] == values[1]


def test_a_file_with_averaged_vectors_is_verified_as_one(run: Run, ckpts: Path):
    """As of a version that averaged them; and one that lists a kind that its sources do not give is refused."""
    assert run("swa", "ckpts", "--average", "*_u", "--average", "*_v").returncode == 0
    path = ckpts.parent / "averaged.safetensors"
    assert min(ratios(load_file(path))) < 0.99
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["ckptavg"]) | {"average": []}
    assert "derived" not in record
    save_file(load_file(path), path, metadata | {"ckptavg": json.dumps(record)})
    assert verify(path, ckpts).differ == []
    record["derived"] = {"spectral_norm": ["0.bias"]}
    save_file(load_file(path), path, metadata | {"ckptavg": json.dumps(record)})
    done = run("verify", path, "--sources", ckpts)
    assert done.returncode == 3 and "derived.spectral_norm is" in done.stderr, done.stderr


KINDS = {
    # kind → names with their shapes; those before the bar are copied from the last candidate
    "queue": ({"queue": (8, 32), "image_queue": (8, 16)}, {"queue_ptr": (1,), "ptr_queue": (1,)}, {"a.weight": (3,)}),
    "quantization": (
        {"a.weight_fake_quant.scale": (1,), "a.activation_post_process.min_val": (), "q_fake_quant.max_val": (4,)},
        {"a.weight_fake_quant.zero_point": (1,)}, {"a.scale": (3,), "min_val": ()},
    ),
    "observations": (
        {"norm._mean": (1, 5), "norm._var": (1, 5), "norm._std": (1, 5), "rms.mean": (5,), "rms.var": (5,)},
        {"norm.count": (), "rms.count": ()}, {"mean": (5,), "bn.running_mean": (5,), "bn.running_var": (5,)},
    ),
    "spectral_norm_other": (
        {"a.parametrizations.weight.1._u": (4,), "a.parametrizations.weight.1._v": (6,), "b.w_u": (7,), "b.w_v": (6,)},
        {}, {"a.parametrizations.weight.original": (4, 6), "b.w_orig": (4, 6), "c.weight_u": (4,), "c.weight_v": (6,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_a_mean_is_that_of_the_last_candidate(run: Run, tmp_path: Path, kind: str):
    copied, integers, averaged = KINDS[kind]
    for step in (1, 2):
        state = {name: torch.full(shape, float(step)) for name, shape in (copied | averaged).items()}
        state |= {name: torch.full(shape, step) for name, shape in integers.items()}
        save_file(state, tmp_path / f"step-{step}.safetensors")
    done = run("swa", ".", "--json")
    assert done.returncode == 0, done.stderr
    report, written = json.loads(done.stdout), load_file(tmp_path / "averaged.safetensors")
    assert {name: float(value.view(-1)[0]) for name, value in written.items()} == (
        dict.fromkeys(copied | integers, 2.0) | dict.fromkeys(averaged, 1.5)
    )
    assert any(REASONS[kind] in warning for warning in report["warnings"])
    assert set(report["output"]["not_averaged"]) == set(copied | integers) and report["output"]["derived"] == []
    assert run("verify", "averaged.safetensors").returncode == 0
    name = next(iter(copied))
    assert run("swa", ".", "--average", name, "--include", "step-*", "--force").returncode == 0
    assert float(load_file(tmp_path / "averaged.safetensors")[name].view(-1)[0]) == 1.5
    result = ckptavg.last(tmp_path, include="step-*", output=tmp_path / "last")
    assert not any(REASONS[kind] in warning for warning in result.warnings)  # its own, of one checkpoint


def test_codebooks_of_moving_averages_are_averaged_and_named_where_they_change(run: Run, tmp_path: Path):
    for step in (1, 2):
        state = {f"vq.{name}": torch.full((4, 3), float(step)) for name in ("embed", "embed_avg")}
        save_file(state | {"vq.cluster_size": torch.ones(4)}, tmp_path / f"step-{step}.safetensors")
    done = run("swa", ".")
    assert "vq.cluster_size and 2 more: code vectors are averaged" in " ".join(done.stderr.split())
    assert float(load_file(tmp_path / "averaged.safetensors")["vq.embed"][0, 0]) == 1.5
    (tmp_path / "frozen").mkdir()
    frozen = load_file(tmp_path / "step-1.safetensors")
    for step in (1, 2):
        save_file(frozen | {"w": torch.full((1,), float(step))}, tmp_path / "frozen" / f"step-{step}.safetensors")
    assert "code vectors" not in run("swa", "frozen", "-o", "b").stderr


def test_ordinary_names_are_of_no_kind(tmp_path: Path):
    """Networks with weight norm, pruning, BatchNorm and codebooks that are parameters; see also the table above."""
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LSTM(4, 4),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Embedding(4, 4), nn.MultiheadAttention(4, 2),
    )  # fmt: skip
    random_unstructured(model[2], "weight", 0.5)
    torch.save(model.state_dict(), tmp_path / "step-1.pt")
    with discover([tmp_path]) as found:
        derived = keeping(found.checkpoints, ())[0].derived
        assert derived is not None and not derived.kinds and not derived.averaged
