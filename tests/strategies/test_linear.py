"""Coefficients of any sum for models that are linear in their weights, against scikit-learn and scipy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TASK, Run
from quadratic import Quadratic
from safetensors.torch import load_file
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

import ckptavg
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run as Context
from ckptavg.errors import OutOfMemoryError, TaskError, UsageError
from ckptavg.objective.mixture import Mixture
from ckptavg.pipeline.verification import verify
from ckptavg.strategies.solvers.linear import FOLDS, RIDGES, minimised
from ckptavg.strategies.twa import TWA
from ckptavg.tasks.objects import TaskObjects
from ckptavg.tasks.python_file import PythonTask

N, B, D = 5, 150, 12
Loss = Callable[[Tensor, Tensor], Tensor]


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X_BD = draws(B, D, seed=0)
TRUTH_D = draws(D, seed=1)
Y_B = (X_BD @ TRUTH_D + 3 * draws(B, seed=2) > 0).long()
BATCHES = [(X_BD[i : i + 40], Y_B[i : i + 40]) for i in range(0, B, 40)]  # the last one has 30


def logistic(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs.squeeze(-1), labels.double(), reduction="none")


def right(model: nn.Module, batch: Any) -> Tensor:
    return ((model(batch[0]).squeeze(-1) > 0) == batch[1].bool()).float()


def linear(classes: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Linear(D, classes, bias=False, dtype=dtype)


def save(folder: Path, states: list[Mapping[str, Tensor]]) -> Path:
    folder.mkdir(exist_ok=True)
    for step, state in enumerate(states, 1):
        torch.save(dict(state), folder / f"step-{step}.pt")
    return folder


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    """Weights around a fifth of the truth: their mean is under-confident, as that of L1 models is."""
    weights = [0.2 * TRUTH_D + 0.3 * draws(D, seed=10 + i) for i in range(N)]
    return save(tmp_path / "ckpts", [{"weight": weight[None]} for weight in weights])


class Numbered(nn.Module):
    """A linear model with a number: checkpoints with equal weights that are no duplicates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.register_buffer("number", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def equal(folder: Path, n: int, weight_D: Tensor) -> Path:
    """Save n models with the same weights."""
    return save(folder, [{"layer.weight": weight_D[None], "number": torch.tensor(i)} for i in range(n)])


def z_bn(folder: Path) -> Any:
    files = [folder / f"step-{i}.pt" for i in range(1, N + 1)]
    return (X_BD @ torch.cat([torch.load(file)["weight"] for file in files]).T).numpy()


def task(model: Callable[[], nn.Module] = linear, of_outputs: Loss = logistic, **parts: Any) -> TaskObjects:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return of_outputs(model(batch[0]), batch[1])

    return TaskObjects(model=model, **{"loss": loss, "val": BATCHES, **parts})


def fitted(folder: Path, objects: TaskObjects, **settings: Any) -> Any:
    """Return what is learned, with the objective's cost."""
    with discover([folder], Window()) as found:
        mixture = Mixture(PythonTask(objects), found.checkpoints, Context(device=torch.device("cpu")))
        return TWA(constraint="linear", **settings).learn(mixture), mixture.cost()


def by_sklearn(z: Any, labels: Tensor, ridge: float) -> Any:
    c = 1 / (ridge * len(labels))
    fit = LogisticRegression(C=c, fit_intercept=False, tol=1e-12, solver="newton-cholesky", max_iter=10_000)
    return fit.fit(z, labels.numpy()).coef_[0]


@pytest.mark.parametrize("ridge", [1e-4, 0.01, 1.0, 100.0])
def test_coefficients_are_those_of_a_logistic_regression_on_the_outputs(ckpts: Path, ridge: float):
    learned, _ = fitted(ckpts, task(), ridge=ridge)
    assert learned.coefficients.linear and learned.tables == {} and learned.held_out is None
    assert learned.coefficients.values[0] == pytest.approx(by_sklearn(z_bn(ckpts), Y_B, ridge), abs=1e-6)


@pytest.mark.parametrize("by", ["metric", "loss"])
def test_auto_takes_the_ridge_that_is_best_by_hand_over_the_folds(ckpts: Path, by: str):
    learned, _ = fitted(ckpts, task(metric=right), ridge="auto", select_by="auto" if by == "metric" else by)
    z, fold_B = z_bn(ckpts), torch.randperm(B, generator=torch.Generator().manual_seed(0)) % FOLDS
    losses, metrics = [], []
    for ridge in reversed(RIDGES):
        held_B = torch.empty(B, dtype=torch.float64)
        for fold in range(FOLDS):
            out_B = fold_B == fold
            c_N = by_sklearn(z[~out_B], Y_B[~out_B], ridge)
            held_B[out_B] = torch.from_numpy(z[out_B] @ c_N)
        losses.append(float(logistic(held_B[:, None], Y_B).mean()))
        metrics.append(int(((held_B > 0) == Y_B.bool()).sum()) / B)
    rows = learned.tables["ridge, by held-out data"]
    assert [row["held-out loss"] for row in rows] == pytest.approx(losses, abs=1e-7)
    assert ["held-out score" in row for row in rows] == [by == "metric"] * len(rows)
    if by == "metric":
        assert [row["held-out score"] for row in rows] == metrics  # to the last bit: ties go to the lower loss
    best = max(range(len(rows)), key=lambda i: (metrics[i] if by == "metric" else 0, -losses[i]))
    expected = by_sklearn(z, Y_B, rows[best]["ridge"])
    assert learned.coefficients.values[0] == pytest.approx(expected, abs=1e-6)
    assert learned.held_out == pytest.approx(losses[best], abs=1e-7)


def test_the_deciding_one_of_several_metrics_chooses_the_ridge_in_its_direction(ckpts: Path):
    def several(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"noise": model(batch[0])[:, 0], "wrong": 1 - right(model, batch)}

    learned, _ = fitted(ckpts, task(metric=several, metric_key="wrong", metric_goal={"wrong": "min", "noise": "max"}))
    plain, _ = fitted(ckpts, task(metric=right))
    assert learned.coefficients == plain.coefficients
    scores = [[row["held-out score"] for row in one.tables["ridge, by held-out data"]] for one in (learned, plain)]
    assert scores[0] == pytest.approx([score - 1 for score in scores[1]], abs=1e-12)


def test_no_single_candidate_and_not_their_mean_is_better_on_the_same_sample(ckpts: Path):
    learned, _ = fitted(ckpts, task(), ridge=1e-3)
    z = torch.from_numpy(z_bn(ckpts))

    def objective(c: Any) -> float:
        c_N = torch.tensor(c, dtype=torch.float64)
        return float(logistic((z @ c_N)[:, None], Y_B).mean() + 1e-3 / 2 * c_N @ c_N)

    rivals = [*(c.values[0] for c in Coefficients.singles(N)), [1 / N] * N]
    assert objective(learned.coefficients.values[0]) < min(map(objective, rivals))


def test_equal_models_get_equal_coefficients(tmp_path: Path):
    folder = equal(tmp_path / "same", N, TRUTH_D)
    (row,) = fitted(folder, task(Numbered), ridge=0.01)[0].coefficients.values
    (alone,) = by_sklearn((X_BD @ TRUTH_D)[:, None].numpy(), Y_B, 0.01 / N)  # λ/2·N·c² = (λ/N)/2·(N·c)²
    assert row == pytest.approx([alone / N] * N, abs=1e-7)


LOSSES: dict[str, tuple[Loss, torch.dtype, float]] = {
    "cross-entropy": (lambda z, y: functional.cross_entropy(z, y, reduction="none"), torch.float64, 1e-6),
    "mean": (lambda z, y: functional.cross_entropy(z, y), torch.float64, 1e-6),
    "squares": (lambda z, y: (z - functional.one_hot(y, 3)).square().sum(dim=1), torch.float64, 1e-6),
    "float32": (lambda z, y: functional.cross_entropy(z.float(), y, reduction="none"), torch.float32, 1e-3),
    # class weights are float32 in the task, and the loss refuses float64 outputs
    "weighted": (lambda z, y: functional.cross_entropy(z, y, torch.tensor([1.0, 2, 3])), torch.float32, 1e-3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_convex_loss_of_several_classes_is_minimised(tmp_path: Path, name: str):
    loss, dtype, tolerance = LOSSES[name]
    labels = (Y_B + (X_BD[:, 0] > 0)).clamp(max=2)
    batches = [(X_BD[i : i + 40].to(dtype), labels[i : i + 40]) for i in range(0, B, 40)]
    weights = [draws(3, D, seed=20 + i) for i in range(N)]
    folder = save(tmp_path / "three", [{"weight": weight.to(dtype)} for weight in weights])
    learned, _ = fitted(folder, task(lambda: linear(3, dtype), loss, val=batches), ridge=0.05)
    stacked = torch.stack([X_BD @ weight.T for weight in weights])
    exact = dtype if name == "weighted" else torch.float64

    def objective(c: Any) -> float:
        z = torch.tensordot(torch.from_numpy(c), stacked, 1).to(exact)
        parts = [float(loss(z[i : i + 40], labels[i : i + 40]).mean()) * len(z[i : i + 40]) for i in range(0, B, 40)]
        return sum(parts) / B + 0.05 / 2 * float(c @ c)

    best = minimize(
        objective, np.zeros(N), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15, "maxiter": 9999}
    )
    if name in ("weighted", "float32"):  # the value of the minimum, because that of float32 is flat around it
        assert objective(np.array(learned.coefficients.values[0])) <= best.fun + tolerance * 1e-3
    else:
        assert learned.coefficients.values[0] == pytest.approx(best.x, abs=tolerance)


class Named(nn.Module):
    """A linear model whose output has other parts, some of them not linear, which the loss leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.layer(x)
        return {"chances": logits.sigmoid(), "inputs": x, "logits": logits, "count": len(x), "hidden": (logits.abs(),)}


@pytest.mark.parametrize("way", ["dict", "forward", "mean", "changed in place"])
def test_the_outputs_are_found_in_the_ways_of_writing_a_task(ckpts: Path, tmp_path: Path, way: str):
    expected = fitted(ckpts, task(), ridge=0.01)[0].coefficients.values[0]
    states = [torch.load(ckpts / f"step-{i}.pt") for i in range(1, N + 1)]

    def doubled(model: nn.Module, batch: Any) -> Tensor:
        batch[0].mul_(1)
        return logistic(model(batch[0]).mul_(2).div_(2), batch[1].sub_(1).add_(1))

    objects = {
        "dict": lambda: task(Named, loss=lambda model, batch: logistic(model(batch[0])["logits"], batch[1])),
        "forward": lambda: task(
            forward=lambda model, batch: model(batch[0]), loss=lambda output, batch: logistic(output, batch[1])
        ),
        "mean": lambda: task(loss=lambda model, batch: logistic(model(batch[0]), batch[1]).mean()),
        "changed in place": lambda: task(loss=doubled),
    }[way]()
    folder = ckpts
    if way == "dict":
        folder = save(tmp_path / "named", [{"layer.weight": state["weight"]} for state in states])
    assert fitted(folder, objects, ridge=0.01)[0].coefficients.values[0] == pytest.approx(expected, abs=1e-9)


def test_each_candidate_is_run_once_over_the_data_and_no_more_than_planned(ckpts: Path):
    learned, cost = fitted(ckpts, task(metric=right))
    with discover([ckpts], Window()) as found:
        mixture = Mixture(PythonTask(task()), found.checkpoints, Context(device=torch.device("cpu")))
        planned = TWA(constraint="linear").stages(N, mixture.losses, "val")
    assert cost.forward_batches == N * len(BATCHES) + 3 == sum(stage.forward for stage in planned)
    assert cost.backward_batches == cost.evaluations == 0 and learned.coefficients.n == N


def test_a_loss_that_falls_without_end_is_told(ckpts: Path):
    separable = [(x, (x @ TRUTH_D > 0).long()) for x, _ in BATCHES]
    weights = [TRUTH_D + 0.01 * draws(D, seed=i) for i in range(2)]
    folder = save(ckpts.parent / "separable", [{"weight": weight[None]} for weight in weights])
    learned, _ = fitted(folder, task(val=separable), ridge=0.0)
    assert "did not settle" in " ".join(learned.notes)
    assert "did not settle" not in " ".join(fitted(folder, task(val=separable), ridge=1e-3)[0].notes)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D, dtype=torch.float64), nn.Linear(D, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.body(x).relu())


class Standardised(nn.Module):
    """Linear, after a buffer that all candidates share: a sum of coefficients other than 1 would scale it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", X_BD.mean(dim=0))
        self.layer = nn.Linear(D, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - self.mean)


def states_of(model: nn.Module, *prefixes: str) -> list[Mapping[str, Tensor]]:
    """Return N states of a model, which differ in the tensors whose names begin so."""
    states: list[Mapping[str, Tensor]] = []
    for i in range(N):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for k, name in enumerate(name for name in state if name.startswith(prefixes)):
            state[name] += 0.3 * draws(*state[name].shape, seed=100 * i + k)
        states.append(state)
    return states


def test_a_residual_network_is_refused_and_forced(tmp_path: Path):
    torch.manual_seed(0)
    folder = save(tmp_path / "residual", states_of(Residual(), ""))
    with pytest.raises(UsageError, match="not linear in its weights") as refused:
        fitted(folder, task(Residual))
    assert "--constraint affine, or --force-linear" in (refused.value.hint or "")
    with discover([folder], Window()) as found:
        mixture = Mixture(PythonTask(task(Residual)), found.checkpoints, Context(device=torch.device("cpu")))
        forced = TWA(constraint="linear", force_linear=True, epochs=20).learn(mixture).coefficients
        plain = [*Coefficients.singles(N), Coefficients.uniform(range(N), N)]
        losses = [mixture.score(c).loss or 0.0 for c in (forced, *plain)]
    assert forced.linear and abs(sum(forced.values[0]) - 1) > 0.01 and losses[0] < min(losses[1:])


def test_what_all_candidates_share_is_kept_on_request_and_the_rest_is_linear(tmp_path: Path):
    for kind, pattern, prefix in ((Standardised, "mean", "layer"), (Residual, "body.*", "head")):
        torch.manual_seed(1)
        folder, objects = save(tmp_path / prefix, states_of(kind(), prefix)), vars(task(kind))
        with pytest.raises(UsageError) as refused:
            ckptavg.twa(folder, constraint="linear", output=tmp_path / "out", **given(objects))
        assert f"--keep '{pattern.replace('*', 'bias')}'" in (refused.value.hint or "")
        ckptavg.twa(folder, constraint="linear", keep=pattern, output=tmp_path / prefix / "out", **given(objects))
        assert not verify(tmp_path / prefix / "out", folder).differ
        (shared,) = {name for name in load_file(tmp_path / prefix / "out") if name in ("mean", "body.weight")}
        assert torch.equal(load_file(tmp_path / prefix / "out")[shared], torch.load(folder / "step-1.pt")[shared])


def given(objects: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in objects.items() if value is not None}


def test_losses_of_more_than_the_output_are_refused(ckpts: Path):
    def decayed(model: nn.Module, batch: Any) -> Tensor:
        return logistic(model(batch[0]), batch[1]) + next(model.parameters()).square().sum()

    def twice(model: nn.Module, batch: Any) -> Tensor:
        return logistic(model(batch[0]) + model(batch[0]), batch[1])

    def hidden(model: nn.Module, batch: Any) -> Tensor:
        return logistic(model(batch[0]), batch[1]) + next(model.parameters()).detach().square().sum()

    for loss, reason in (
        (decayed, "more than the model's output"),
        (twice, "2 times"),
        (hidden, "more than the model"),
    ):
        with pytest.raises(TaskError, match=reason):
            fitted(ckpts, task(loss=loss))


@pytest.mark.parametrize(("free", "kind"), [(1000, "the data"), (17_500, "the outputs of 5 candidates")])
def test_what_does_not_fit_in_memory_is_refused(ckpts: Path, monkeypatch: pytest.MonkeyPatch, free: int, kind: str):
    """The inputs are 16,000 bytes and the outputs of three classes 18,000."""
    folder = save(ckpts.parent / "wide", [{"weight": draws(3, D, seed=i)} for i in range(N)])
    objects = task(lambda: linear(3), lambda z, y: functional.cross_entropy(z, y, reduction="none"))
    monkeypatch.setattr("ckptavg.objective.outputs.free_memory", lambda _: free / 0.7)
    with pytest.raises(OutOfMemoryError, match=kind):
        fitted(folder, objects)


def test_few_bits_are_refused(ckpts: Path):
    with pytest.raises(UsageError, match="not 4 bits"):
        ckptavg.twa(ckpts, constraint="linear", bits=4, output=ckpts.parent / "out", **given(vars(task())))


def test_batchnorm_is_refused_by_the_command_in_one_line(run: Run, digits: Path):
    done = run("twa", digits, "--last", 3, "--constraint", "linear", "--task", TASK)
    assert done.returncode == 2 and "with BatchNorm (1) the model's output is not linear" in done.stderr
    assert "hint: --constraint affine, or --force-linear" in done.stderr


def test_the_written_file_is_the_sum_and_is_verified(ckpts: Path, run: Run, tmp_path: Path):
    torch.save([X_BD, Y_B], tmp_path / "data.pt")
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "x, y = torch.load('data.pt')\n"
        f"def model(): return torch.nn.Linear({D}, 1, bias=False, dtype=torch.float64)\n"
        "def loss(model, batch):\n"
        "    logits = model(batch[0]).squeeze(-1)\n"
        "    return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch[1].double(), reduction='none')\n"
        "def val_dataloader(): return [(x, y)]\n"
    )
    done = run("twa", ckpts, "--constraint", "linear", "--ridge", "auto", "--task", "mine.py", "-o", "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    coefficients = [candidate["coefficient"] for candidate in report["candidates"]]
    assert sum(coefficients) > 1.5 and "the coefficients sum to" in json.dumps(report)
    weights = torch.cat([torch.load(ckpts / f"step-{i}.pt")["weight"] for i in range(1, N + 1)])
    total = torch.tensor(coefficients, dtype=torch.float64) @ weights
    assert load_file(tmp_path / "out")["weight"][0].tolist() == pytest.approx(total.tolist(), rel=1e-14, abs=1e-15)
    checked = run("verify", "out", "--sources", ckpts)
    assert checked.returncode == 0, checked.stderr
    strategies = "swa,twa:constraint=linear:ridge=auto,twa:solver=quadratic:ridge=auto"
    compared = run("compare", ckpts, "--strategies", strategies, "--task", "mine.py", "-o", "best", "--json")
    assert json.loads(compared.stdout)["winner"] == strategies.split(",")[1], compared.stderr


def test_tensors_equal_in_all_candidates_are_multiplied_too(tmp_path: Path):
    """A sum that keeps them, as one of coefficients that sum to 1 does, would not be the model that was scored."""
    folder, objects = equal(tmp_path / "equal", 2, TRUTH_D), given(vars(task(Numbered)))
    result = ckptavg.twa(folder, constraint="linear", ridge=0.1, output=tmp_path / "out", baselines=False, **objects)
    total = sum(float(candidate.coefficient) for candidate in result.candidates)  # pyright: ignore
    assert len(result.candidates) == 2 and abs(total - 1) > 0.1
    assert load_file(tmp_path / "out")["layer.weight"][0].tolist() == pytest.approx(
        (total * TRUTH_D).tolist(), rel=1e-15
    )
    assert not verify(tmp_path / "out", folder).differ


def test_newton_stops_where_the_loss_has_no_curvature_in_some_directions(ckpts: Path):
    """Equal models without a ridge: coefficients stay on the line through the start that the loss depends on."""
    folder = equal(ckpts.parent / "pair", 2, TRUTH_D)
    with discover([folder], Window()) as found:
        mixture = Mixture(PythonTask(task(Numbered)), found.checkpoints, Context(device=torch.device("cpu")))
        assert mixture.losses is not None
        outputs = mixture.losses.outputs()
        start_N = torch.tensor([1.0, 0.0], dtype=torch.float64)
        c_N = minimised(outputs, outputs.examples_U, 0.0, start_N).c_N
    (alone,) = by_sklearn((X_BD @ TRUTH_D)[:, None].numpy(), Y_B, 1e-9)
    assert float(c_N.sum()) == pytest.approx(alone, abs=1e-5) and float(c_N[0] - c_N[1]) == pytest.approx(1, abs=1e-9)


def test_a_toy_without_outputs_is_refused_and_forced_to_zero():
    """The quadratic's best mixture of any sum is 0: by gradients all coefficients shrink."""
    objective = Quadratic(n=4, d=6, seed=0)
    with pytest.raises(UsageError, match="not linear"):
        TWA(constraint="linear").learn(objective)
    forced = TWA(constraint="linear", force_linear=True, epochs=200, lr=0.1).learn(objective).coefficients
    affine = TWA(epochs=200, lr=0.1).learn(objective).coefficients
    assert (objective.score(forced).loss or 0) < 0.1 * (objective.score(affine).loss or 0)
