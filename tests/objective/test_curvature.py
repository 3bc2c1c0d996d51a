"""Surrogate of a network against finite differences and an explicit JᵀHJ, and models without the derivatives.

Shape suffixes: N = candidates, M = elements of the model's output.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import pytest
import torch
from conftest import Job
from stored import stored
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ckptavg.candidates import Candidates
from ckptavg.errors import TaskError
from ckptavg.objective import batchnorm
from ckptavg.objective.curvature import gauss_newton, surrogate
from ckptavg.objective.curvature.directions import Directions
from ckptavg.surrogate import Surrogate
from ckptavg.tasks.batch import Batch, size

N = 4
Loss = Callable[[Any, Any], Tensor]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Attention(nn.Module):
    """Fused attention over six numbers as a sequence of two, normalised by LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(3, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.norm(self.inside(x.view(len(x), 2, 3))).chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].sum(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
    "attention": Attention,
    "transformer layer": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.Linear(3, 4),
        nn.TransformerEncoderLayer(4, 2, 4, activation="gelu", batch_first=True),  # even heads: has a fast path
        nn.Flatten(),
        nn.Linear(8, 3),
    ),
    "logistic": lambda: nn.Linear(6, 3),
}


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 6, generator=draws, dtype=torch.float64), torch.randint(3, (n,), generator=draws))
        for n in sizes
    ]


def make_candidates(folder: Path, make: Callable[[], nn.Module], n: int = N, **options: Any) -> Candidates:
    """Return random float64 candidates of a model in eval mode, with BatchNorm in training mode."""
    models: list[nn.Module] = []
    for seed in range(n + 1):
        torch.manual_seed(seed)
        models.append(make().double())
    candidates = Candidates(
        models.pop().eval(), stored(folder, [m.state_dict() for m in models]), lambda *_: None, **options
    )
    for layer in batchnorm.layers(candidates.model).values():
        layer.train()
    return candidates


def in_float32(folder: Path, make: Callable[[], nn.Module]) -> Candidates:
    torch.manual_seed(0)
    states = [make().state_dict() for _ in range(N)]
    return Candidates(make().eval(), stored(folder, states), lambda *_: None)


def surrogate_of(candidates: Candidates, data: Sequence[Any], loss: Loss = cross_entropy, **options: Any) -> Surrogate:
    sized = [batch if isinstance(batch, Batch) else Batch(batch, size(batch)) for batch in data]
    return surrogate(candidates, lambda: sized, loss, **options)


class _Loss(nn.Module):
    """Module whose forward is the loss, so that functional_call reaches the model inside it."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def literal(
    candidates: Candidates, data: Sequence[Any], loss: Loss = cross_entropy, *, whole: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return F(β), differentiable: the mean loss at parameters Σ β_i w_i; if ``whole``, the loss tensors instead."""
    names = [name for name, _ in candidates.model.named_parameters()]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for one_hot in torch.eye(candidates.n, dtype=torch.float64):
        candidates.materialize(one_hot)
        for name in names:
            rows[name].append(candidates.model.get_parameter(name).detach().clone())
    candidates.materialize(torch.full((candidates.n,), 1 / candidates.n, dtype=torch.float64))
    stacked = {f"model.{name}": torch.stack(values) for name, values in rows.items()}
    module = _Loss(candidates.model, loss)

    def mean_loss(beta: Tensor) -> Tensor:
        mixed = {name: torch.einsum("n,n...->...", beta, values) for name, values in stacked.items()}
        parts = [functional_call(module, mixed, (batch,)) for batch in data]
        if whole:
            return torch.cat(parts)
        return sum(part.mean() * len(batch[0]) for part, batch in zip(parts, data, strict=True)) / sum(
            len(batch[0]) for batch in data
        )

    return mean_loss


def differences(f: Callable[[Tensor], Tensor], n: int = N) -> tuple[float, Tensor, Tensor]:
    """Return F, g and H on Σ β = 1; g from values and H from gradients, to fourth order in the step."""
    middle = torch.full((n,), 1 / n, dtype=torch.float64)
    flat = torch.eye(n, dtype=torch.float64) - 1 / n
    step = 3e-4

    def gradient(beta: Tensor) -> Tensor:
        beta = beta.clone().requires_grad_()
        return flat @ torch.autograd.grad(f(beta), beta)[0]

    def slope(g: Callable[[Tensor], Tensor], d: Tensor) -> Tensor:
        near, far = (g(middle + k * step * d) - g(middle - k * step * d) for k in (1, 2))
        return (8 * near - far) / (12 * step)

    with torch.no_grad():
        g_N = torch.stack([slope(f, d) for d in flat])
    return float(f(middle)), g_N, torch.stack([slope(gradient, d) for d in flat])


def literal_gauss_newton(candidates: Candidates, data: Sequence[Any], outputs: Loss, after: Loss) -> Tensor:
    """Return Jᵀ(∂²ℓ/∂o²)J from full matrices; ``outputs(model, batch)`` gives o and ``after(o, batch)`` the loss."""
    n = candidates.n
    flat, middle = torch.eye(n, dtype=torch.float64) - 1 / n, torch.full((n,), 1 / n, dtype=torch.float64)
    total, examples = torch.zeros(n, n, dtype=torch.float64), 0
    for batch in data:

        def given(o: Tensor, batch: Any = batch) -> Tensor:
            return after(o, batch).mean()  # pyright: ignore

        returned = literal(candidates, [batch], outputs, whole=True)
        o = returned(middle).detach()
        jacobian_MN = torch.autograd.functional.jacobian(returned, middle).reshape(o.numel(), n) @ flat
        bent_MM = torch.autograd.functional.hessian(given, o).reshape(o.numel(), o.numel())
        total += len(batch[0]) * jacobian_MN.t() @ bent_MM @ jacobian_MN
        examples += len(batch[0])
    return total / examples


def assert_near(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Compare relative to the largest entry of ``expected``."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_surrogate_matches_finite_differences(tmp_path: Path, name: str):
    candidates, data = make_candidates(tmp_path, NETWORKS[name]), batches(5, 3, 7)
    value, g_N, h_NN = differences(literal(candidates, data))
    result = surrogate_of(candidates, data, hessian="exact")
    assert result.curvature == "exact" and bool(result.note) == (name in ("attention", "transformer layer"))
    assert result.value == pytest.approx(value, rel=1e-12)
    assert_near(result.gradient_N, g_N, 1e-8)  # rounding: 1e-16 over the step, and the step to the fourth
    assert_near(result.hessian_NN, h_NN, 1e-8)


def test_gauss_newton_is_exact_for_a_linear_model(tmp_path: Path):
    candidates, data = make_candidates(tmp_path, NETWORKS["logistic"]), batches(5, 3)
    exact, other = (surrogate_of(candidates, data, hessian=h) for h in ("exact", "gauss-newton"))
    assert_near(other.hessian_NN, exact.hessian_NN, 1e-10)
    assert_near(other.gradient_N, exact.gradient_N, 1e-10)
    assert other.value == exact.value and (exact.curvature, other.curvature) == ("exact", "gauss-newton")


@pytest.mark.parametrize("kept", [1 << 30, 0])
@pytest.mark.parametrize("name", NETWORKS)
def test_gauss_newton_is_jt_h_j(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kept: int):
    monkeypatch.setattr(gauss_newton, "_KEPT", kept)
    candidates, data = make_candidates(tmp_path, NETWORKS[name]), batches(5, 3)
    result = surrogate_of(candidates, data)
    expected = literal_gauss_newton(
        candidates,
        data,
        lambda model, batch: model(batch[0]),
        lambda o, batch: nn.functional.cross_entropy(o, batch[1]),
    )
    assert result.curvature == "gauss-newton"
    assert_near(result.hessian_NN, expected, 1e-12)
    assert float(torch.linalg.eigvalsh(result.hessian_NN).min()) > -1e-14 * float(expected.trace())
    assert_near(result.gradient_N, differences(literal(candidates, data))[1], 1e-8)


@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
def test_batches_are_weighted_by_their_size(tmp_path: Path, hessian: str):
    candidates, whole = make_candidates(tmp_path, NETWORKS["mlp"]), batches(9)
    ((x, y),) = whole
    parts = [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])]
    together, apart = (surrogate_of(candidates, data, hessian=hessian) for data in (whole, parts))
    assert apart.value == pytest.approx(together.value, rel=1e-14)
    assert_near(apart.gradient_N, together.gradient_N, 1e-13)
    assert_near(apart.hessian_NN, together.hessian_NN, 1e-13)


def test_derivatives_are_along_coefficients_that_sum_to_one(tmp_path: Path):
    data = [(x.float(), y) for x, y in batches(5)]
    for hessian in ("exact", "gauss-newton"):
        # float32 rounds the mean, so the differences d_j do not sum to zero
        candidates = in_float32(tmp_path / hessian, NETWORKS["mlp"])
        result = surrogate_of(candidates, data, hessian=hessian)
        assert abs(float(result.gradient_N.sum())) < 1e-15 and float(result.hessian_NN.sum(dim=0).abs().max()) < 1e-15
        assert torch.equal(result.hessian_NN, result.hessian_NN.t())


@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
@pytest.mark.parametrize("name", ["cnn", "mlp", "transformer"])
def test_surrogate_of_real_trainings_matches_the_gradient_of_the_mixture(jobs: dict[str, Job], name: str, hessian: str):
    with jobs[name].mixture(last=6) as mixture:
        expected, value, examples = torch.zeros(6, dtype=torch.float64), 0.0, 0
        data = list(mixture.task.sized_batches("val"))
        for _, size in data:
            c = mixture.losses.uniform().requires_grad_()
            loss = mixture.losses.loss(c)
            loss.backward()
            assert c.grad is not None
            expected, value, examples = expected + size * c.grad, value + size * float(loss.detach()), examples + size
        expected = expected / examples
        with batchnorm.batch_statistics(batchnorm.layers(mixture.mixed.model)):
            result = surrogate_of(mixture.mixed.candidates, data, mixture.task.loss, hessian=hessian)
    assert result.value == pytest.approx(value / examples, rel=1e-5)
    assert_near(result.gradient_N, expected - expected.mean(), 1e-3)  # float32, and expected is a small difference
    lowest = float(torch.linalg.eigvalsh(result.hessian_NN).min())
    assert hessian == "exact" or lowest > -1e-6 * float(result.hessian_NN.trace())


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
def test_packed_candidates_give_the_surrogate_of_the_rounded_candidates(tmp_path: Path, bits: int, hessian: str):
    coarse = make_candidates(tmp_path / "stored", NETWORKS["BatchNorm"], bits=bits, group_size=8)
    rounded: list[dict[str, Tensor]] = []
    for one_hot in torch.eye(N, dtype=torch.float64):
        coarse.materialize(one_hot)
        rounded.append({name: tensor.clone() for name, tensor in coarse.model.state_dict().items()})
    exact = make_candidates(tmp_path, NETWORKS["BatchNorm"])
    same = Candidates(exact.model, stored(tmp_path / "rounded", rounded), lambda *_: None)
    got, expected = (surrogate_of(candidates, batches(5, 4), hessian=hessian) for candidates in (coarse, same))
    assert_near(got.gradient_N, expected.gradient_N, 1e-5)  # rows are decoded in float32
    assert_near(got.hessian_NN, expected.hessian_NN, 1e-5)
    assert float((got.hessian_NN - surrogate_of(exact, batches(5, 4)).hessian_NN).abs().max()) > 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
def test_gpt2_with_tied_embeddings(tmp_path: Path, hessian: str):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=6, n_embd=4, n_layer=1, n_head=2)
    states: list[dict[str, Tensor]] = []
    for seed in range(3):
        torch.manual_seed(seed)
        state = GPT2LMHeadModel(config).double().state_dict()
        states.append({name: 5 * tensor for name, tensor in state.items() if name != "lm_head.weight"})
    candidates = Candidates(GPT2LMHeadModel(config).double().eval(), stored(tmp_path, states), lambda *_: None)
    tokens = torch.randint(11, (7, 6), generator=torch.Generator().manual_seed(0))

    def logits(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return model(input_ids=batch[0]).logits

    def after(logits: Tensor, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return after(logits(model, batch), batch)

    data = [(tokens[:5],), (tokens[5:],)]
    value, g_N, h_NN = differences(literal(candidates, data, loss), 3)
    if hessian == "gauss-newton":
        h_NN = literal_gauss_newton(candidates, data, logits, after)
    result = surrogate_of(candidates, data, loss, hessian=hessian)
    assert result.curvature == hessian and result.value == pytest.approx(value, rel=1e-10)
    assert_near(result.gradient_N, g_N, 1e-7)
    assert_near(result.hessian_NN, h_NN, 1e-7)


class Pair(NamedTuple):
    logits: Tensor
    extra: Any


@dataclass
class Record:
    logits: Tensor
    extra: Any


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda o: (o.argmax(), [o, None], 2 * o), lambda out: out[1][0]),
    "named tuple": (lambda o: Pair(o, 3), lambda out: out.logits),
    "dict": (lambda o: {"hidden": o.detach(), "logits": o, "text": "x"}, lambda out: out["logits"]),
    "dataclass": (lambda o: Record(o, None), lambda out: out.logits),
    "in two": (lambda o: o.split(1, dim=1), lambda out: torch.cat(list(out), dim=1)),
    "changed in place": (lambda o: o, lambda out: out.mul_(2)),
}


class Wrapped(nn.Module):
    def __init__(self, returns: Callable[[Tensor], Any] = lambda o: o) -> None:
        super().__init__()
        self.inner = NETWORKS["mlp"]()
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        return self.returns(self.inner(x))


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_model_may_return_any_nesting(tmp_path: Path, name: str):
    wrap, unwrap = OUTPUTS[name]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(unwrap(model(batch[0])), batch[1])

    def plain_loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]) * (2 if "place" in name else 1), batch[1])

    plain = surrogate_of(make_candidates(tmp_path / "a", Wrapped), batches(5, 3), plain_loss)
    result = surrogate_of(make_candidates(tmp_path / "b", lambda: Wrapped(wrap)), batches(5, 3), loss)
    assert result.curvature == "gauss-newton" and not result.note
    assert_near(result.hessian_NN, plain.hessian_NN, 1e-12)


def _called_twice(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + cross_entropy(model, batch)


def _inside(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model.get_submodule("inner")(batch[0]), batch[1])


def _penalty(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch).mean() + sum(w.square().sum() for w in model.parameters())


def _linear(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])[:, 0]


def _absolute(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0])[:, 0] - batch[1]).abs()


REFUSED: dict[str, tuple[Loss, str]] = {
    "twice": (_called_twice, "calls the model 2 times, not once"),
    "not itself": (_inside, "calls the model 0 times, not once"),
    "penalty": (_penalty, "depends on the weights by more than"),
    "linear": (_linear, "is linear in the model's output"),
    "absolute": (_absolute, "has no curvature in the model's output"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_cannot_be_split_gets_the_exact_hessian(tmp_path: Path, name: str):
    loss, reason = REFUSED[name]
    candidates, data = make_candidates(tmp_path, Wrapped), batches(5, 3)
    result = surrogate_of(candidates, data, loss)
    assert result.curvature == "exact" and reason in result.note and "no gauss-newton Hessian" in result.note
    assert_near(result.hessian_NN, differences(literal(candidates, data, loss))[2], 1e-7)
    with pytest.raises(TaskError, match=reason) as raised:
        surrogate_of(candidates, data, loss, hessian="gauss-newton", source="task.py")
    assert str(raised.value).startswith("task.py: ") and raised.value.hint == "--hessian exact may be possible"


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0] * ctx.saved_tensors[0].cos()


class NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0] * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] * ctx.saved_tensors[0].cos()


class Neither(NoForwardMode):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0] * ctx.saved_tensors[0].cos()


def test_auto_is_exact_without_forward_mode(tmp_path: Path):
    candidates, data = make_candidates(tmp_path, lambda: Wrapped(NoForwardMode.apply)), batches(5, 3)
    result = surrogate_of(candidates, data)
    assert result.curvature == "exact" and result.note.startswith("no gauss-newton Hessian: ")
    assert_near(result.hessian_NN, differences(literal(candidates, data))[2], 1e-8)


def test_auto_is_gauss_newton_without_double_backward(tmp_path: Path):
    made = [
        make_candidates(tmp_path / str(i), lambda f=f: Wrapped(f))
        for i, f in enumerate((NoDoubleBackward.apply, torch.sin))
    ]
    result, plain = (surrogate_of(candidates, batches(5, 3)) for candidates in made)
    assert result.curvature == "gauss-newton" and not result.note
    assert_near(result.hessian_NN, plain.hessian_NN, 1e-12)
    with pytest.raises(TaskError, match=r"no exact Hessian: .*once_differentiable") as raised:
        surrogate_of(made[0], batches(5, 3), hessian="exact")
    assert raised.value.hint == "--hessian gauss-newton may be possible"


def test_one_line_of_error_without_forward_mode_and_double_backward(tmp_path: Path):
    candidates = make_candidates(tmp_path, lambda: Wrapped(Neither.apply))
    with pytest.raises(TaskError, match=r"no gauss-newton Hessian: .*; no exact Hessian: ") as raised:
        surrogate_of(candidates, batches(5))
    assert "\n" not in str(raised.value) and raised.value.hint is None


def test_gauss_newton_is_refused_if_forward_mode_contradicts_backward_mode(tmp_path: Path):
    def frozen_below(x: Tensor) -> Tensor:
        with torch.no_grad():  # backward mode stops here, forward mode does not
            half = x * 0.5
        return x + half

    candidates, data = make_candidates(tmp_path, lambda: Wrapped(frozen_below)), batches(5, 3)
    result = surrogate_of(candidates, data)
    assert result.curvature == "exact" and "forward- and backward-mode derivatives of the model disagree" in result.note


@pytest.mark.parametrize(("hessian", "op"), [("exact", "backward is not implemented"), ("gauss-newton", "forward AD")])
def test_fused_attention_is_replaced_with_a_note(tmp_path: Path, hessian: str, op: str):
    candidates = make_candidates(tmp_path, NETWORKS["attention"])
    result = surrogate_of(candidates, batches(5), hessian=hessian)
    assert result.curvature == hessian and "_flash_attention_" in result.note and op in result.note
    assert result.note.startswith(f"plain kernels for the {hessian} Hessian: ")
    assert torch.backends.mkldnn.set_flags()[0] and torch.backends.mha.get_fastpath_enabled()


def test_the_graph_of_gauss_newton_keeps_no_matrix_of_attention(tmp_path: Path):
    """Only forward mode needs plain attention; the batch that failed without it is freed before the next one."""
    alive, kept = WeakSet[Tensor](), list[tuple[int, int]]()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        kept.append((len(alive), 0))
        losses = cross_entropy(model, batch)
        alive.add(losses)
        return losses

    def pack(tensor: Tensor) -> Tensor:
        kept[-1] = (kept[-1][0], kept[-1][1] + (tensor.shape[-2:] == (2, 2)))
        return tensor

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = surrogate_of(make_candidates(tmp_path, NETWORKS["attention"]), batches(5), loss)
    finally:
        gc.enable()
    assert result.curvature == "gauss-newton" and "plain kernels" in result.note
    assert kept == [(0, 0), (0, 0)]


@pytest.mark.parametrize("network", ["mlp", "attention"])
def test_a_direction_is_taken_as_a_tangent_without_a_copy(tmp_path: Path, network: str):
    """Weights are views of one vector: torch would copy a tangent laid out otherwise into a vector of that size."""
    candidates = make_candidates(tmp_path, NETWORKS[network])
    directions = Directions(candidates, cross_entropy, lambda *_: None, lambda: None)
    with forward_ad.dual_level():
        for weight, tangent in zip(directions.weights, directions[1], strict=True):
            taken = forward_ad.unpack_dual(forward_ad.make_dual(weight.data, tangent)).tangent
            assert taken is not None and taken.data_ptr() == tangent.data_ptr()


def test_surrogate_of_a_recurrent_network(tmp_path: Path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.view(len(x), 2, 3))[0][:, -1])

    candidates, data = make_candidates(tmp_path, Recurrent), batches(5, 3)
    result = surrogate_of(candidates, data, hessian="exact")
    other = surrogate_of(candidates, data)
    assert other.curvature == "gauss-newton"
    assert_near(other.gradient_N, result.gradient_N, 1e-10)


def test_mixed_precision_inside_the_loss_also_applies_to_the_second_call(tmp_path: Path):
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(batch[0].float())
        assert output.dtype == torch.bfloat16
        return nn.functional.cross_entropy(output.float(), batch[1])

    seen: list[torch.dtype] = []

    def record_dtype(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x

    candidates = in_float32(tmp_path, lambda: Wrapped(record_dtype))
    result = surrogate_of(candidates, batches(8, 8), loss)
    assert set(seen) == {torch.bfloat16} and len(seen) == 2 * (1 + N)
    plain = surrogate_of(candidates, [(x.float(), y) for x, y in batches(8, 8)])
    assert result.curvature == "gauss-newton" and not result.note
    assert_near(result.hessian_NN, plain.hessian_NN, 0.05)  # bfloat16 has an eight-bit significand


@pytest.mark.parametrize("kept", [1 << 30, 0])
@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
def test_counted_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hessian: str, kept: int):
    monkeypatch.setattr(gauss_newton, "_KEPT", kept)
    spent: Counter[tuple[str, int]] = Counter()
    surrogate_of(
        make_candidates(tmp_path, NETWORKS["mlp"]),
        batches(5, 3),
        hessian=hessian,
        count=lambda kind, examples: spent.update([(kind, examples)]),
    )
    backward = 1 + 2 * N if hessian == "exact" else 1 if kept else 1 + N
    forward = 0 if hessian == "exact" else N  # besides the calls of the model
    assert +spent == +Counter({(k, n): t for k, t in (("forward", forward), ("backward", backward)) for n in (5, 3)})


@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
def test_the_model_is_left_at_the_mean(tmp_path: Path, hessian: str):
    candidates = make_candidates(tmp_path, NETWORKS["mlp"])
    candidates.materialize(torch.full((N,), 1 / N, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in candidates.model.state_dict().items()}
    surrogate_of(candidates, batches(5, 3), hessian=hessian)
    assert all(torch.equal(tensor, before[name]) for name, tensor in candidates.model.state_dict().items())


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # otherwise an output would keep the node that saves it alive


@pytest.mark.parametrize("kept", [1 << 30, 0])
@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
def test_memory_holds_the_graph_of_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hessian: str, kept: int):
    monkeypatch.setattr(gauss_newton, "_KEPT", kept)
    living: WeakSet[Held] = WeakSet()
    peaks: list[int] = []

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        living.add(held)
        peaks[-1] = max(peaks[-1], sum(each.tensor.nbytes for each in living))
        return held

    def data() -> Iterator[Batch]:
        for batch in batches(5, 5, 5, 5):
            assert not living  # no graph outlives its batch
            peaks.append(0)
            yield Batch(batch, 5)

    candidates = make_candidates(tmp_path, NETWORKS["mlp"])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        watched = surrogate(candidates, data, cross_entropy, hessian=hessian)
    assert torch.equal(watched.hessian_NN, surrogate_of(candidates, batches(5, 5, 5, 5), hessian=hessian).hessian_NN)
    assert len(peaks) == 4 and peaks[0] > 0 and len(set(peaks)) == 1


def test_a_loss_without_gradient_or_finite_value_is_an_error(tmp_path: Path):
    candidates = make_candidates(tmp_path, NETWORKS["mlp"])

    def detached(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch).detach()

    def infinite(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * math.inf

    with pytest.raises(TaskError, match=r"^task.py: loss\(\) has no gradient"):
        surrogate_of(candidates, batches(5), detached, source="task.py")
    with pytest.raises(TaskError, match=r"the loss is inf in batch 1, at the mean"):
        surrogate_of(candidates, batches(5), infinite)


def test_out_of_memory_is_raised_unchanged(tmp_path: Path):
    def greedy(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return x

    with pytest.raises(RuntimeError, match="can't allocate"):
        surrogate_of(make_candidates(tmp_path, lambda: Wrapped(greedy)), batches(5))


def test_surrogate_of_one_candidate_is_flat(tmp_path: Path):
    result = surrogate_of(make_candidates(tmp_path, NETWORKS["mlp"], n=1), batches(5))
    assert result.gradient_N.tolist() == [0] and result.hessian_NN.tolist() == [[0]]
