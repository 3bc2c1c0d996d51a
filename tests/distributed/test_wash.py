"""The recipe of WASH, and PAPA's rule.

Shape suffixes: N = members, D = parameters, K = chosen scalars, S = rows of state (weights, momentum).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import wash
from torch import nn

from distributed.conftest import Torchrun

MEMBERS = 3


@pytest.fixture(scope="module")
def ranks(torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what `wash_program` wrote, by rank."""
    folder = tmp_path_factory.mktemp("wash")
    recipes = str(Path(wash.__file__).parent)
    root = str(Path(wash.__file__).parents[2])
    torchrun(MEMBERS, Path(__file__).with_name("wash_program.py"), folder, cwd=folder, PYTHONPATH=f"{recipes}:{root}")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(MEMBERS)]


def stacked(ranks: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.stack([each[name] for each in ranks])


def test_the_first_layer_has_probability_p_and_the_last_zero():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.BatchNorm1d(2), nn.Linear(2, 1), nn.Linear(1, 1, bias=False))
    p_D = wash.probabilities(model, 0.3)
    assert p_D.tolist() == pytest.approx([0.3] * 8 + [0.2] * 4 + [0.1] * 3 + [0.0])
    assert len(p_D) == len(nn.utils.parameters_to_vector(model.parameters()))
    assert wash.probabilities(nn.Linear(2, 1), 0.3).tolist() == pytest.approx([0.3] * 3)


def test_a_shared_parameter_belongs_to_its_first_layer():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 2), nn.Linear(2, 5))
    model[2].weight = model[0].weight
    p_D = wash.probabilities(model, 0.3)
    assert p_D.tolist() == pytest.approx([0.3] * 10 + [0.15] * 6 + [0.0] * 5)
    assert len(p_D) == len(nn.utils.parameters_to_vector(model.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--p", "1.5"), "--p and --alpha must be between 0 and 1"), ((), "needs two processes at least")],
)
def test_wrong_settings_end_in_one_line(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["wash.py", "--out", "nowhere", *options])
    with pytest.raises(SystemExit):
        wash.main()
    assert message in capsys.readouterr().err


def test_half_of_the_scalars_of_two_members_are_swapped_at_p_1():
    chosen_K, source_KN = wash.draw(torch.ones(10_000), 2, torch.Generator().manual_seed(0))
    assert chosen_K.tolist() == list(range(10_000))
    swapped = int((source_KN[:, 0] == 1).sum())
    assert abs(swapped - 5000) < 4 * math.sqrt(10_000 / 4)  # four standard deviations of the binomial


def test_every_permutation_is_drawn_alike_and_positions_with_their_probability():
    p_D = torch.tensor([0.0, 0.25, 1.0]).repeat(20_000)
    chosen_K, source_KN = wash.draw(p_D, 3, torch.Generator().manual_seed(0))
    counts = (chosen_K % 3).bincount(minlength=3).tolist()
    assert counts[0] == 0 and counts[2] == 20_000
    assert abs(counts[1] - 5000) < 4 * math.sqrt(20_000 * 0.25 * 0.75)
    kinds, often = source_KN.unique(dim=0, return_counts=True)
    assert len(kinds) == 6 and kinds.sort(dim=1).values.eq(torch.arange(3)).all()
    mean = len(source_KN) / 6
    assert (often - mean).abs().max() < 4 * math.sqrt(mean)


def test_a_shuffle_permutes_each_position_among_the_members_as_drawn(ranks: list[dict[str, Any]]):
    before_NSD, after_NSD = stacked(ranks, "before"), stacked(ranks, "after")
    chosen_K, source_KN = ranks[0]["drawn"]
    wanted_NSD = before_NSD.clone()
    for i, sources in zip(chosen_K.tolist(), source_KN.tolist(), strict=True):
        for member, source in enumerate(sources):
            wanted_NSD[member, :, i] = before_NSD[source, :, i]
    assert 2000 < len(chosen_K) < 3000 and after_NSD.equal(wanted_NSD)


def test_a_shuffle_leaves_the_members_mean_as_it_is_and_momentum_goes_along(ranks: list[dict[str, Any]]):
    before_NSD, after_NSD = stacked(ranks, "before"), stacked(ranks, "after")
    assert after_NSD.sort(dim=0).values.equal(before_NSD.sort(dim=0).values)
    assert not after_NSD.equal(before_NSD)
    assert after_NSD[:, 1].equal(2 * after_NSD[:, 0])


def test_papa_moves_the_members_towards_their_mean(ranks: list[dict[str, Any]]):
    weights_ND = stacked(ranks, "before")[:, 0].double()
    wanted_ND = 0.75 * weights_ND + 0.25 * weights_ND.mean(dim=0)
    assert torch.allclose(stacked(ranks, "pulled").double(), wanted_ND, rtol=1e-6, atol=1e-6)


def test_probability_zero_is_training_alone(ranks: list[dict[str, Any]]):
    for each in ranks:
        assert each["trained"]["p = 0, 5 steps"].equal(each["trained"]["none, 5 steps"])
    states = [each["trained"]["none, 5 steps"] for each in ranks]
    assert not states[0].equal(states[1])  # each has its own order of the data


def test_a_step_of_training_is_shuffled_with_its_momentum_if_asked(ranks: list[dict[str, Any]]):
    alone_NSD, both_NSD, weights_NSD = (
        torch.stack([each["trained"][name] for each in ranks]) for name in ("none", "shuffled", "weights only")
    )
    assert not both_NSD.equal(alone_NSD) and both_NSD[:, 0].equal(weights_NSD[:, 0])
    assert both_NSD.sort(dim=0).values.equal(alone_NSD.sort(dim=0).values)
    assert weights_NSD[:, 1].equal(alone_NSD[:, 1]) and not both_NSD[:, 1].equal(alone_NSD[:, 1])
