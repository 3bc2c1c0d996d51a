"""Layer-wise coefficients: the block rule, loss and gradient per block, and the exact average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from objective.test_mixture import Toy, by_hand, network, reference_model
from stored import stored
from torch import Tensor, nn

from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.candidates import Candidates
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients, group_of
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Checkpoint, ...]:
    states: list[dict[str, Tensor]] = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(
            {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in network().state_dict().items()}
        )
        states[-1]["1.running_var"].abs_()
    return stored(tmp_path, states)


def test_blocks_follow_the_modules_or_their_size(checkpoints: tuple[Checkpoint, ...]):
    """Sizes in order: 12, 4 | 4, 4, 4, 4 | 8, 2; a block closes once it has more than the size."""
    found = Candidates(network(), checkpoints, lambda *_: None)
    names = [name for name, tensor in network().state_dict().items() if tensor.is_floating_point()]
    assert found.blocks(None) == (
        ("0.weight", "0.bias"),
        ("1.weight", "1.bias", "1.running_mean", "1.running_var"),
        ("4.weight", "4.bias"),
    )
    assert found.blocks(0) == tuple((name,) for name in names)
    assert found.blocks(12) == (tuple(names[:2]), tuple(names[2:6]), tuple(names[6:]))
    assert found.blocks(10**9) == (tuple(names),)


def test_a_tied_parameter_is_in_one_block_under_both_names(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    state = {"embed.weight": torch.ones(4, 3), "head.weight": torch.ones(4, 3)}
    found = Candidates(Tied(), stored(tmp_path, [state, state]), lambda *_: None)
    assert found.blocks(None) == (("embed.weight", "head.weight"),)


def test_the_longest_prefix_wins():
    groups = (("",), ("a.", "b"), ("a.c",))
    assert [group_of(name, groups) for name in ("x", "a.b", "b", "a.c", "a.cd")] == [0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="covers the tensor x"):
        group_of("x", (("a",),))


def test_loss_and_gradient_by_block_match_plain_torch(checkpoints: tuple[Checkpoint, ...]):
    mixture = Mixture(Toy(), checkpoints, Run(device=torch.device("cpu")))
    groups = mixture.losses.blocks(None)
    c = torch.softmax(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    c.requires_grad_()
    loss = mixture.losses.loss(c, groups=groups)
    (gradient,) = torch.autograd.grad(loss, c)
    batch = Toy().splits["val"][0]
    rows = [by_hand(checkpoints, c[g]) for g in range(3)]
    state = {name: rows[group_of(name, groups)][name] for name in rows[0]}
    state = {name: t.detach().clone() if "running" in name else t for name, t in state.items()}
    logits = torch.func.functional_call(reference_model(), state, (batch["x"],))
    expected = nn.functional.cross_entropy(logits, batch["y"])
    (expected_gradient,) = torch.autograd.grad(expected, c)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_distances_by_block_are_norms_of_the_parameters(checkpoints: tuple[Checkpoint, ...]):
    mixture = Mixture(Toy(), checkpoints, Run(device=torch.device("cpu")))
    groups = mixture.losses.blocks(None)
    found = mixture.losses.distances(groups)
    alone = [by_hand(checkpoints, torch.eye(3, dtype=torch.float64)[i]) for i in range(3)]
    mean = by_hand(checkpoints, torch.full((3,), 1 / 3, dtype=torch.float64))
    for g, group in enumerate(groups):
        for i in range(3):
            off = [(alone[i][name] - mean[name]).flatten() for name in group if "running" not in name]
            assert found[g, i].item() == pytest.approx(torch.cat(off).norm().item(), rel=1e-12)


def test_the_average_by_block_is_exact(checkpoints: tuple[Checkpoint, ...]):
    groups = (("0.",), ("1.", "4.bias"), ("4.weight",))
    coefficients = Coefficients(((0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (-1.0, 0.0, 2.0)), groups)
    specs = output_specs(checkpoints)
    written = {name: bytearray(spec.nbytes) for name, spec in specs.items()}
    for name, offset, data in weighted_average(checkpoints, coefficients, specs):
        written[name][offset : offset + len(data)] = data
    for name, spec in specs.items():
        if spec.dtype == "F64":
            found = torch.frombuffer(written[name], dtype=torch.float64).view(spec.shape)
            c = torch.tensor(coefficients.row(name), dtype=torch.float64)
            torch.testing.assert_close(found, by_hand(checkpoints, c)[name], rtol=1e-14, atol=1e-15)
        else:  # integers come from the last candidate selected in any group
            last = bytearray(spec.nbytes)
            checkpoints[2].read_into(name, 0, memoryview(last))
            assert written[name] == last
