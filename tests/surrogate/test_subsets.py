"""The best subsets against brute force over all of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.surrogate import Surrogate, subsets
from ckptavg.surrogate.branch_and_bound import Relaxation, convexifier, fix
from ckptavg.surrogate.energy import Energy, Shortlist
from ckptavg.surrogate.subsets import best_for_every_k, best_subsets

# q of order 1, as sums of at most N² terms of order 1/K²; the two sides add them in different orders
CLOSE = 1e-12


def random_surrogate(n: int, seed: int, *, psd: bool = True, slope: float = 1.0, rank: int | None = None) -> Surrogate:
    draws = torch.Generator().manual_seed(seed)
    half = torch.randn(n, rank or 2 * n, generator=draws, dtype=torch.float64)
    square = torch.randn(n, n, generator=draws, dtype=torch.float64)
    hessian = half @ half.T / half.shape[1] if psd else (square + square.T) / 2
    return Surrogate(1.5, slope * torch.randn(n, generator=draws, dtype=torch.float64), hessian, "exact")


def at_the_average_of(q: Surrogate, mask: tuple[int, ...]) -> float:
    beta = torch.zeros(q.n, dtype=torch.float64)
    beta[list(mask)] = 1 / len(mask)
    return float(q(beta))


def ranked(q: Surrogate, k: int) -> list[tuple[int, ...]]:
    return sorted(itertools.combinations(range(q.n), k), key=lambda mask: at_the_average_of(q, mask))


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable enumeration, except for the full set."""
    monkeypatch.setattr(subsets, "ENUMERATED", 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.data(), st.booleans(), st.sampled_from([0.0, 0.05, 1.0]), st.integers(0, 10**6))
def test_enumeration_matches_brute_force(n: int, data: st.DataObject, psd: bool, slope: float, seed: int):
    k, count = data.draw(st.integers(1, n)), data.draw(st.integers(1, 20))
    q = random_surrogate(n, seed, psd=psd, slope=slope)
    found, expected = best_subsets(q, k, count), ranked(q, k)[:count]
    assert found.proof == "enumerated"
    assert len(set(found.masks)) == len(found.masks) == len(expected)
    assert found.values == pytest.approx([at_the_average_of(q, mask) for mask in expected], abs=CLOSE)
    assert found.values == pytest.approx([at_the_average_of(q, mask) for mask in found.masks], abs=CLOSE)


@pytest.mark.parametrize("k", [3, 7])
def test_small_blocks_give_the_same_result(monkeypatch: pytest.MonkeyPatch, k: int):
    q = random_surrogate(10, 4)
    whole = best_subsets(q, k, 12)
    monkeypatch.setattr(subsets, "CELLS", 12)
    assert best_subsets(q, k, 12).masks == whole.masks == tuple(ranked(q, k)[:12])


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("psd", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_branch_and_bound_matches_brute_force(seed: int, psd: bool):
    for n, k, count in ((10, 4, 5), (9, 7, 3), (8, 1, 8), (3, 2, 2), (2, 1, 2), (7, 3, 40)):
        q = random_surrogate(n, seed, psd=psd, slope=0.05)
        found = best_subsets(q, k, count)
        assert found.proof == "branch and bound"
        assert found.masks == tuple(ranked(q, k)[:count])


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("k", [7, 13])
def test_branch_and_bound_matches_the_enumeration(monkeypatch: pytest.MonkeyPatch, k: int):
    """Zero slope for a deep tree, and no swap search, which alone would find the best subsets."""
    q = random_surrogate(18, 1, slope=0.0)
    monkeypatch.setattr(subsets, "_swap", lambda *_: None)
    found = best_subsets(q, k, 200)
    monkeypatch.undo()
    assert found.proof == "branch and bound"
    assert found.masks == best_subsets(q, k, 200).masks


def test_ten_of_forty_are_proven_to_be_the_best_and_a_small_limit_gives_up(monkeypatch: pytest.MonkeyPatch):
    """847 million subsets; an independent check tries all exchanges of one or two candidates."""
    q = random_surrogate(40, 0, slope=0.3)
    found = best_subsets(q, 10, 1)
    assert found.proof == "branch and bound"
    (best,) = found.masks
    rest = [i for i in range(40) if i not in best]
    near = [
        sorted(set(best) - set(out) | set(new))
        for size in (1, 2)
        for out in itertools.combinations(best, size)
        for new in itertools.combinations(rest, size)
    ]
    beta_MN = torch.zeros(len(near), 40, dtype=torch.float64).scatter_(1, torch.tensor(near), 0.1)
    assert found.values[0] <= float(q(beta_MN).min()) + CLOSE
    monkeypatch.setattr(subsets, "NODES", 3)
    flat = random_surrogate(40, 0, slope=0.0)
    given_up = best_subsets(flat, 10, 4)
    assert given_up.proof == "heuristic" and len(given_up.masks) == 4
    assert given_up == best_subsets(flat, 10, 4)  # reproducible
    assert list(given_up.values) == sorted(given_up.values)


@pytest.mark.usefixtures("searched")
def test_the_swap_search_alone_ends_where_no_exchange_is_better(monkeypatch: pytest.MonkeyPatch):
    q = random_surrogate(60, 5, psd=False, slope=0.0)
    monkeypatch.setattr(subsets, "NODES", 0)
    for k in (20, 40):
        found = best_subsets(q, k, 6)
        assert found.proof == "heuristic"
        best = set(found.masks[0])
        near = [best - {i} | {j} for i in best for j in set(range(60)) - best]
        assert found.values[0] <= min(at_the_average_of(q, tuple(mask)) for mask in near) + CLOSE
        assert found.values == pytest.approx([at_the_average_of(q, mask) for mask in found.masks], abs=CLOSE)


@pytest.mark.parametrize("k", [2, 4])
def test_ties_go_to_the_later_candidates(k: int):
    flat = Surrogate(0.0, torch.zeros(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64), "exact")
    latest = sorted(itertools.combinations(range(6), k), reverse=True)
    assert best_subsets(flat, k, 4).masks == tuple(latest[:4])
    # three pairs of identical candidates at i and i + 3: every choice within a pair is a tie
    few = random_surrogate(3, 8)
    q = Surrogate(1.0, few.gradient_N.repeat(2), few.hessian_NN.repeat(2, 2), "exact")
    order = sorted(itertools.combinations(range(6), k), key=lambda mask: (round(at_the_average_of(q, mask), 9),))
    value = at_the_average_of(q, order[0])
    first = max(mask for mask in order if at_the_average_of(q, mask) < value + 1e-9)
    assert best_subsets(q, k, 1).masks == (first,)


@pytest.mark.usefixtures("searched")
def test_a_flat_surrogate_is_proven_flat():
    flat = Surrogate(2.0, torch.zeros(30, dtype=torch.float64), torch.zeros(30, 30, dtype=torch.float64), "exact")
    found = best_subsets(flat, 10, 1)
    assert (found.masks, found.values, found.proof) == ((tuple(range(20, 30)),), (2.0,), "branch and bound")


@pytest.mark.parametrize("limit", [1, 10**6])
def test_terms_that_vanish_on_the_plane_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, limit: int):
    """Add a constant to g and c·11ᵀ + v1ᵀ + 1vᵀ to H, for which Δᵀ…Δ = 0 if ΣΔ = 0."""
    monkeypatch.setattr(subsets, "ENUMERATED", limit)
    q = random_surrogate(9, 2)
    v_N = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = Surrogate(q.value, q.gradient_N + 7, q.hessian_NN + 100 + v_N + v_N[:, None], "exact")
    for k in (3, 6):
        one, other = best_subsets(q, k, 5), best_subsets(moved, k, 5)
        assert one.masks == other.masks
        assert one.values == pytest.approx(other.values, abs=100 * CLOSE)


def test_every_size_is_solved_with_a_shared_node_limit(monkeypatch: pytest.MonkeyPatch):
    q = random_surrogate(9, 6)
    every = best_for_every_k(q, 3)
    assert every == {k: best_subsets(q, k, 3) for k in range(1, 10)}
    monkeypatch.setattr(subsets, "ENUMERATED", 9)
    searched = best_for_every_k(q, 3)
    assert {k: found.masks for k, found in searched.items()} == {k: found.masks for k, found in every.items()}
    assert {found.proof for k, found in searched.items() if 1 < k < 8} == {"branch and bound"}


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_holds_at_any_node_and_fixing_loses_no_better_subset(seed: int):
    """Two candidates are in and one is out; the cut is low enough to fix others."""
    q, draws = random_surrogate(10, seed, psd=seed % 2 == 0, slope=0.05), torch.Generator().manual_seed(seed)
    energy = Energy.of(q, 5)
    relaxation, shortlist = Relaxation.of(energy, convexifier(energy.hessian_NN)), Shortlist(energy, 2)
    best = torch.zeros(2, 10, dtype=torch.float64)
    for row, mask in zip(best, ranked(q, 5)[1:3], strict=True):
        row[list(mask)] = 1
    shortlist.see(best)
    state_1N = torch.zeros(1, 10, dtype=torch.int8)
    state_1N[0, torch.randperm(10, generator=draws)[:3]] = torch.tensor([1, 1, -1], dtype=torch.int8)
    z_1N = relaxation.descend(state_1N, torch.full((1, 10), 0.5, dtype=torch.float64), 3)
    z_1N = z_1N + 3 + 0.1 * torch.rand(1, 10, generator=draws, dtype=torch.float64)  # a tangent anywhere is a bound
    fixed_1N, bound_1 = fix(relaxation, shortlist, state_1N, z_1N)
    every = torch.zeros(math.comb(10, 5), 10, dtype=torch.float64)
    every.scatter_(1, torch.tensor(list(itertools.combinations(range(10), 5))), 1)
    within = every[((state_1N == 0) | (every == (state_1N > 0))).all(dim=1)]
    assert float(energy(within).min()) >= float(bound_1) - energy.rounding
    lost = within[~((fixed_1N == 0) | (within == (fixed_1N > 0))).all(dim=1)]
    assert bool((energy(lost) >= shortlist.cut).all())
    constant_1, slope_1N = relaxation.tangent(z_1N)
    tangent = constant_1 + within @ slope_1N[0]
    assert float(tangent.min()) == pytest.approx(float(bound_1), abs=CLOSE)
    for i in (state_1N[0] == 0).nonzero()[:, 0].tolist():
        without = [float(tangent[within[:, i] == side].min()) >= shortlist.cut for side in (0, 1)]
        assert int(fixed_1N[0, i]) == without[0] - without[1] or all(without)


@pytest.mark.parametrize("psd", [True, False])
def test_the_convexifier_is_valid_and_beats_the_least_eigenvalue(psd: bool):
    h_NN = random_surrogate(12, 3, psd=psd).hessian_NN
    d_N = convexifier(h_NN)
    basis = torch.linalg.svd(torch.ones(1, 12, dtype=torch.float64)).Vh[1:]
    plane = basis @ (h_NN - d_N.diag()) @ basis.T
    assert float(torch.linalg.eigvalsh(plane)[0]) >= -1e-13 * float(h_NN.abs().max()) * 12  # rounding of two products
    assert float(d_N.sum()) > 12 * float(torch.linalg.eigvalsh(basis @ h_NN @ basis.T)[0])


def test_invalid_arguments_are_refused():
    q = random_surrogate(4, 0)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"between 1 and 4, the number of candidates, not {k}"):
            best_subsets(q, k, 1)
    with pytest.raises(ValueError, match="the number of subsets must be at least 1"):
        best_for_every_k(q, 0)
    broken = Surrogate(0.0, q.gradient_N, q.hessian_NN * math.nan, "exact")
    with pytest.raises(ValueError, match="not finite"):
        best_subsets(broken, 2, 1)
