"""The vectors of spectral norm: those of LAPACK's singular value decomposition, and of torch's own power iteration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored import stored
from torch import Tensor, nn

from ckptavg.average import derived, plan_output
from ckptavg.average.runs import part
from ckptavg.average.spectral_norm import leading
from ckptavg.average.weighted_sum import output_specs
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.kept import keeping
from ckptavg.coefficients import Coefficients
from ckptavg.pipeline.verification import verify

State = dict[str, Tensor]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_values(*singular: float) -> Tensor:
    """Return a square matrix of these singular values, in float64."""
    n = len(singular)
    left, right = (torch.linalg.qr(drawn(n, n, seed=seed, dtype=torch.float64))[0] for seed in (1, 2))
    return left @ torch.diag(torch.tensor(singular, dtype=torch.float64)) @ right.T


MATRICES = {
    "square": drawn(40, 40), "wide": drawn(3, 200), "tall": drawn(200, 3), "row": drawn(1, 9), "column": drawn(9, 1),
    "one": drawn(1, 1), "bfloat16": drawn(8, 20).bfloat16(), "rank one": drawn(6, 1) @ drawn(1, 7),
    "close": with_values(1, 1 - 1e-6, 0.9, 0.5, 0.1), "tied": with_values(2, 2, 1), "identity": torch.eye(5),
    "blocks": drawn(1000, 300), "huge": drawn(6, 6) * 1e30, "tiny": drawn(6, 6) * 1e-30,
}  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_they_are_unit_vectors_whose_sigma_is_the_largest_singular_value(matrix: Tensor):
    u, v = leading(matrix, torch.ones(matrix.shape[0]), torch.ones(matrix.shape[1]))
    exact, wide = torch.linalg.svdvals(matrix.double())[0], matrix.double()
    assert torch.stack([u.norm(), v.norm()]).sub(1).abs().max() < 1e-14
    assert abs(u @ wide @ v / exact - 1) < 1e-13  # the residual is below 1.5e-14 σ², and LAPACK's error near 1e-15
    assert (wide @ v - exact * u).norm() < 1e-13 * exact


def test_a_start_at_a_smaller_singular_value_is_left():
    """As where the average's order of two directions is not the last candidate's; power iteration would stay."""
    matrix, start = torch.diag(torch.tensor([1.4, 1.6])), torch.tensor([1.0, 0.0])
    assert leading(matrix, start, start)[0].abs().tolist() == pytest.approx([0, 1], abs=1e-12)


def test_of_equal_singular_values_the_vector_nearest_the_start_is_taken():
    start = drawn(5, dtype=torch.float64)
    _, v = leading(torch.eye(5), start, start)
    assert (v - start / start.norm()).norm() < 2e-6  # of the small vector that is added


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_of_a_weight_that_has_none_the_given_ones_are_returned(value: float):
    u, v = leading(torch.full((3, 4), value), torch.ones(3), torch.ones(4))
    assert u.equal(torch.ones(3)) and v.equal(torch.ones(4))


def test_the_bits_do_not_depend_on_threads():
    results: list[tuple[Tensor, Tensor]] = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(leading(drawn(500, 700), torch.ones(500), torch.ones(700)))
    torch.set_num_threads(before)
    assert results[0][0].equal(results[1][0]) and results[0][1].equal(results[1][1])


def network(norm: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(
        norm(nn.Conv2d(2, 4, 3)), norm(nn.ConvTranspose2d(4, 6, 3)), norm(nn.ConvTranspose2d(6, 6, 1)),
        nn.Flatten(), norm(nn.Linear(96, 96)), norm(nn.Linear(96, 5), name="bias"),
    )  # fmt: skip


NORMS = {"old": nn.utils.spectral_norm, "new": nn.utils.parametrizations.spectral_norm}


def trained(norm: Callable[..., nn.Module], steps: int = 3) -> list[State]:
    """Return the states of a network that is trained with large steps."""
    torch.manual_seed(0)
    model = network(norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    states: list[State] = []
    for i in range(5 * steps):
        model(drawn(8, 2, 4, 4, seed=i)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states[4::5]


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_an_average_runs_as_after_many_power_iterations_of_torch(
    run: Run, tmp_path: Path, norm: Callable[..., nn.Module], dtype: str
):
    (tmp_path / "ckpts").mkdir()
    for i, state in enumerate(states := trained(norm)):
        torch.save(state, tmp_path / "ckpts" / f"step-{i}.pt")
    done = run("swa", "ckpts", "--dtype", dtype, "--json")
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "averaged.safetensors")
    named = json.loads(done.stdout)["output"]["derived"]
    assert named == sorted(name for name in written if name.endswith(("_u", "_v"))) and len(named) in (8, 10)
    model, reference = (network(norm).to(getattr(torch, dtype)) for _ in range(2))
    model.load_state_dict(written)
    weights = {n: torch.stack([s[n].double() for s in states]).mean(dim=0) for n in written if n not in named}
    reference.load_state_dict(written | {n: w.to(written[n].dtype) for n, w in weights.items()})
    x = drawn(8, 2, 4, 4).to(getattr(torch, dtype))
    reference = reference.double().train()
    with torch.no_grad():
        for _ in range(1000):  # in training mode each pass is one power iteration
            reference(x[:1].double())
        expected, got = reference.eval()(x.double()), model.double().eval()(x.double())
    # u and v are rounded to the dtype: a relative error of eps/2 in each of two factors σ of each of five layers
    assert (got - expected).norm() <= 10 * torch.finfo(getattr(torch, dtype)).eps * expected.norm() + 1e-10
    found = verify(tmp_path / "averaged.safetensors", tmp_path / "ckpts")
    assert (len(found.agree), found.differ, found.unchecked) == (len(written), [], [])
    damaged = written | {named[0]: -written[named[0]]}
    with safe_open(tmp_path / "averaged.safetensors", "pt") as file:
        save_file(damaged, tmp_path / "damaged.safetensors", file.metadata())
    assert verify(tmp_path / "damaged.safetensors", tmp_path / "ckpts").differ == [named[0]]


def in_parts(ckpts: tuple[Checkpoint, ...], coefficients: Coefficients, world_size: int) -> dict[str, bytearray]:
    specs = output_specs(ckpts)
    whole = {name: bytearray(spec.nbytes) for name, spec in specs.items()}
    for rank in range(world_size):
        for name, start, data in derived.average(ckpts, coefficients, specs, only=part(ckpts[0], rank, world_size)):
            assert not any(whole[name][start : start + len(data)])
            whole[name][start : start + len(data)] = data
    return whole


def test_ranks_write_the_parts_of_the_same_vectors(tmp_path: Path):
    ckpts = keeping(stored(tmp_path, trained(NORMS["new"])), ())
    mean = Coefficients.uniform(range(3), 3)
    assert all(in_parts(ckpts, mean, size) == in_parts(ckpts, mean, 1) for size in (2, 5, 64))


def test_a_layer_of_one_candidate_or_of_equal_ones_keeps_its_own_vectors(tmp_path: Path):
    states = trained(NORMS["old"])
    frozen = {name for name in states[0] if name.startswith("0.")}
    states = [state | {name: states[0][name] for name in frozen} for state in states]
    ckpts = keeping(stored(tmp_path, states), ())
    blocks = Coefficients(((0.0, 1.0, 0.0), (0.5, 0.0, 0.5)), (("1.",), ("",)))
    written = in_parts(ckpts, blocks, 1)
    for name in ("0.weight_u", "0.weight_v", "1.weight_u", "1.weight_v"):
        assert bytes(written[name]) == states[1][name].numpy().tobytes(), name
    assert bytes(written["2.weight_u"]) != states[2]["2.weight_u"].numpy().tobytes()
    assert plan_output(ckpts, Coefficients.singles(3)[1]).derived == {}
    single = in_parts(ckpts, Coefficients.singles(3)[1], 1)
    assert all(bytes(single[name]) == value.numpy().tobytes() for name, value in states[1].items())


def test_options_keep_or_average_them(run: Run, tmp_path: Path):
    states = trained(NORMS["old"])
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"step-{i}.safetensors")
    done = run("swa", ".", "--average", "0.weight_[uv]", "--keep", "1.weight_[uv]", "--keep", "4.weight_orig", "--json")
    assert done.returncode == 0, done.stderr
    written, output = load_file(tmp_path / "averaged.safetensors"), json.loads(done.stdout)["output"]
    assert torch.allclose(written["0.weight_u"], sum(state["0.weight_u"] for state in states) / 3)  # pyright: ignore
    assert all(written[name].equal(states[-1][name]) for name in ("1.weight_u", "1.weight_v", "4.weight_u"))
    assert output["not_averaged"] == ["1.weight_u", "1.weight_v", "4.weight_orig"]
    assert "1.weight_u" not in output["derived"] and "2.weight_u" in output["derived"]
    assert run("verify", "averaged.safetensors").returncode == 0


def test_a_score_command_gets_the_file_that_is_written(run: Run, tmp_path: Path):
    for i, state in enumerate(trained(NORMS["old"])):
        save_file(state, tmp_path / f"step-{i}.safetensors")
    command = "cp {} scored-$(echo $CKPTAVG_NAME | tr ' ' _); echo 1"
    done = run("swa", ".", "--include", "step-*", "--score-cmd", command)
    assert done.returncode == 0, done.stderr
    scored, written = load_file(tmp_path / "scored-mean_of_steps_0,_1,_2"), load_file(tmp_path / "averaged.safetensors")
    assert all(scored[name].equal(value) for name, value in written.items())
