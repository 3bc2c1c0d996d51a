"""The candidate matrix against plain torch: w(c) is the weighted sum, and `pullback` is autograd's gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ckptavg.candidates import Candidates, plan
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.kept import keeping
from ckptavg.errors import InputError, TaskError, UsageError


class Tied(nn.Module):
    """Model with a tied parameter, a BatchNorm, an integer buffer, and a float buffer that is not a statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)) * self.scale)


def ignore(stage: str, done: int, total: int) -> None:
    """Progress callback that does nothing."""


def states(model: nn.Module, n: int) -> list[dict[str, Tensor]]:
    """Return n state dicts of the model with random values; tied names share one tensor."""
    result: list[dict[str, Tensor]] = []
    for i in range(n):
        generator = torch.Generator().manual_seed(i)
        fresh: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            value = torch.rand(tensor.shape, generator=generator) + 0.5
            state[name] = fresh.setdefault(
                id(tensor), (value * (1 if tensor.is_floating_point() else 9)).to(tensor.dtype)
            )
        result.append(state)
    return result


def candidates(model: nn.Module, saved: list[dict[str, Tensor]], folder: Path) -> Candidates:
    for i, state in enumerate(saved):
        torch.save(state, folder / f"step-{i}.pt")
    return Candidates(model, discover([folder]).checkpoints, ignore)


def test_materialize_computes_the_weighted_sum_of_every_floating_tensor(tmp_path: Path):
    model = Tied()
    saved = states(model, 5)
    matrix = candidates(model, saved, tmp_path)
    c = torch.tensor([0.5, -0.2, 0.3, 0.1, 0.3])
    matrix.materialize(c)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            expected = sum(float(c[i]) * saved[i][name].double() for i in range(5))
            # 5 products of numbers below 1.5, each rounded once in float32, and 4 sums
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=10 * 1.5 * 2**-24)


def test_a_tied_parameter_is_stored_once(tmp_path: Path):
    model = Tied()
    matrix = candidates(model, states(model, 3), tmp_path)
    unique = sum(p.numel() for p in model.parameters()) + sum(
        b.numel() for b in model.buffers() if b.is_floating_point()
    )
    assert matrix.nbytes == 3 * 4 * unique
    assert model.head.weight is model.embed.weight


def test_pullback_matches_autograds_gradient_of_the_coefficients(tmp_path: Path):
    model = Tied()
    saved = states(model, 4)
    tokens = torch.arange(7)

    def loss_at(c: Tensor) -> Tensor:
        parameters = {name: sum(c[i] * saved[i][name] for i in range(4)) for name, _ in model.named_parameters()}
        parameters["head.weight"] = parameters["embed.weight"]
        buffers = {"scale": sum(c[i].detach() * saved[i]["scale"] for i in range(4))}
        model.train()
        return torch.func.functional_call(model, {**parameters, **buffers}, (tokens,)).square().mean()

    c = torch.tensor([0.4, 0.3, 0.2, 0.1], requires_grad=True)
    reference = Tied()  # functional_call on its own copy: the model below loses its storage to the flat vector
    model, real = reference, model
    (expected,) = torch.autograd.grad(loss_at(c), c)
    model = real
    matrix = candidates(model, saved, tmp_path)
    matrix.materialize(c.detach())
    matrix.zero_gradient()
    model.train()
    model(tokens).square().mean().backward()
    torch.testing.assert_close(matrix.pullback()[0], expected, rtol=1e-4, atol=1e-5)
    matrix.zero_gradient()
    assert torch.equal(matrix.pullback(), torch.zeros(1, 4))


def test_integers_are_those_of_the_given_candidate_and_else_of_the_last(tmp_path: Path):
    model = Tied()
    saved = states(model, 3)
    matrix = candidates(model, saved, tmp_path)
    c = torch.full((3,), 1 / 3)
    matrix.materialize(c, last=1)
    assert torch.equal(model.state_dict()["count"], saved[1]["count"])
    matrix.materialize(c)
    assert torch.equal(model.state_dict()["count"], saved[2]["count"])


def test_a_model_of_mixed_precision_has_a_matrix_for_each_dtype(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3).to(torch.bfloat16), nn.Linear(3, 3))
    saved = states(model, 2)
    matrix = candidates(model, saved, tmp_path)
    matrix.materialize(torch.tensor([1.0, 0.0]))
    assert all(torch.equal(tensor, saved[0][name]) for name, tensor in model.state_dict().items())
    assert matrix.nbytes == 2 * (12 * 2 + 12 * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_candidates_are_summed_in_float32_with_float32_coefficients(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "BUFFER", 1)
    monkeypatch.setattr(plan, "LEAST", 5)  # columns: pieces smaller than the matrix
    model = nn.Linear(6, 4).to(dtype)
    saved = states(model, 5)
    matrix = candidates(model, saved, tmp_path)
    matrix.materialize(torch.full((5,), 0.2, dtype=torch.float64))
    for name, tensor in model.state_dict().items():
        exact = torch.stack([state[name].double() for state in saved]).mean(dim=0)
        # half a unit in the last place, plus the rounding of five float32 sums of numbers below 2
        torch.testing.assert_close(tensor.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=10 * 2**-24)
    model.weight.grad.fill_(1)  # pyright: ignore[reportOptionalMemberAccess]
    expected = torch.stack([state["weight"].double().sum() for state in saved])
    torch.testing.assert_close(matrix.pullback()[0].double(), expected, rtol=24 * 2**-24, atol=0)


def test_a_file_may_hold_only_one_of_two_tied_names(tmp_path: Path):
    """Hugging Face saves only one of two tied names."""
    model = Tied()
    saved = [{name: t for name, t in state.items() if name != "embed.weight"} for state in states(model, 2)]
    candidates(model, saved, tmp_path).materialize(torch.tensor([0.0, 1.0]))
    assert torch.equal(model.embed.weight, saved[1]["head.weight"])


def test_tied_names_that_differ_in_the_file_are_refused(tmp_path: Path):
    model = Tied()
    saved = states(model, 2)
    saved[1]["head.weight"] = saved[1]["head.weight"] + 1
    with pytest.raises(InputError, match=r"step-1\.pt: head\.weight: is tied to embed\.weight"):
        candidates(model, saved, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("scale"), "only it has scale"),
        (lambda state: state.update(extra=torch.zeros(1)), "it lacks extra"),
        (lambda state: state.update(scale=torch.zeros(5)), r"scale of shape \[4\], the checkpoints \[5\]"),
        (lambda state: state.update(scale=torch.zeros(4, dtype=torch.int32)), "scale as torch.float32"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
):
    saved = states(Tied(), 2)
    for state in saved:
        change(state)
    with pytest.raises(TaskError, match=message):
        candidates(Tied(), saved, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_refused_by_name(tmp_path: Path, value: float):
    saved = states(Tied(), 3)
    saved[2]["norm.weight"][1] = value
    with pytest.raises(InputError, match=r"step-2\.pt: norm\.weight: 1 value is NaN or infinite") as caught:
        candidates(Tied(), saved, tmp_path)
    assert caught.value.hint == "leave it out with --exclude 'step-2.pt', or all bad ones with --skip-bad"


def test_keeping_one_of_two_tied_names_is_refused_and_both_are_copied(tmp_path: Path):
    saved = states(Tied(), 3)
    for i, state in enumerate(saved):
        save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / f"step-{i}.safetensors")
    with discover([tmp_path]) as found:
        with pytest.raises(UsageError, match=r"--keep matches head\.weight, but not embed\.weight"):
            Candidates(Tied(), keeping(found.checkpoints, ["head*"]), ignore)
        matrix = Candidates(Tied(), keeping(found.checkpoints, ["head*", "embed*"]), ignore)
        matrix.materialize(torch.tensor([0.5, 0.5, 0.0]), last=1)
    assert torch.equal(matrix.model.state_dict()["head.weight"], saved[1]["embed.weight"])
    assert not next(matrix.model.parameters()).requires_grad


def test_load_restores_the_whole_state(tmp_path: Path):
    model = Tied()
    candidates(model, states(model, 2), tmp_path)
    other = states(model, 5)[4]
    (tmp_path / "other").mkdir()
    save_file({name: tensor.clone() for name, tensor in other.items()}, tmp_path / "other" / "step-9.safetensors")
    (checkpoint,) = discover([tmp_path / "other"]).checkpoints
    again = Candidates(Tied(), [checkpoint], ignore)
    again.load(checkpoint.tensors, checkpoint.read_into)
    assert all(torch.equal(tensor, other[name]) for name, tensor in again.model.state_dict().items())


def test_the_hint_names_the_prefix_of_a_nested_model(tmp_path: Path):
    """As in Lightning, where names are prefixed with the attribute that holds the module."""
    saved = [{f"net.{name}": tensor for name, tensor in state.items()} for state in states(Tied(), 2)]
    with pytest.raises(TaskError, match="does not fit") as caught:
        candidates(Tied(), saved, tmp_path)
    assert caught.value.hint is not None and "names begin with net., as if" in caught.value.hint


def test_a_checkpoint_that_changes_while_being_read_is_named(tmp_path: Path):
    for i, state in enumerate(states(Tied(), 2)):
        torch.save(state, tmp_path / f"step-{i}.pt")
    with discover([tmp_path]) as found:
        torch.save(states(Tied(), 3)[2], tmp_path / "step-1.pt")
        with pytest.raises(InputError, match=r"step-1\.pt: changed while it was being read"):
            Candidates(Tied(), found.checkpoints, ignore)
