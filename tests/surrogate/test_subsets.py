"""The best subsets against brute force over all of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic import random_surrogate

from ckptavg.surrogate import Surrogate, subsets
from ckptavg.surrogate.subsets import best_of_sizes, best_subsets

# q of order 1, as sums of at most N² terms of order 1/K²; the two sides add them in different orders
CLOSE = 1e-12


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
def test_the_swap_search_matches_brute_force(seed: int, psd: bool):
    for n, k, count in ((10, 4, 5), (9, 7, 3), (8, 1, 8), (3, 2, 2), (2, 1, 2), (7, 3, 40)):
        q = random_surrogate(n, seed, psd=psd, slope=0.05)
        found = best_subsets(q, k, count)
        assert found.proof == "heuristic"
        assert found.masks == tuple(ranked(q, k)[:count])


@pytest.mark.parametrize("k", [7, 13])
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_the_swap_search_matches_the_enumeration(monkeypatch: pytest.MonkeyPatch, slope: float, k: int):
    q = random_surrogate(18, 1, slope=slope)
    expected = best_subsets(q, k, 200)
    monkeypatch.setattr(subsets, "ENUMERATED", 1)
    found = best_subsets(q, k, 200)
    assert (found.proof, expected.proof) == ("heuristic", "enumerated")
    assert found.masks == expected.masks
    assert found.values == pytest.approx(expected.values, abs=CLOSE)


@pytest.mark.usefixtures("searched")
def test_one_start_finds_what_thirty_find_by_going_on_from_the_listed_masks(monkeypatch: pytest.MonkeyPatch):
    """Without going on, the list would miss masks that are two exchanges from the path of the search."""
    q = random_surrogate(24, 3, slope=0.3)
    expected = best_subsets(q, 9, 30)
    monkeypatch.setattr(subsets, "DRAWS", 0)
    assert best_subsets(q, 9, 30).masks == expected.masks


def test_ten_of_forty_are_found_again_and_no_one_or_two_exchanges_are_better():
    """847 million subsets are too many to enumerate."""
    q = random_surrogate(40, 0, slope=0.3)
    found = best_subsets(q, 10, 1)
    assert found.proof == "heuristic" and found == best_subsets(q, 10, 1)  # reproducible
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


@pytest.mark.parametrize("k", [20, 40])
def test_the_swap_search_ends_where_no_exchange_is_better(k: int):
    q = random_surrogate(60, 5, psd=False, slope=0.0)
    found = best_subsets(q, k, 6)
    assert found.proof == "heuristic" and len(set(found.masks)) == 6
    best = set(found.masks[0])
    near = [best - {i} | {j} for i in best for j in set(range(60)) - best]
    assert found.values[0] <= min(at_the_average_of(q, tuple(mask)) for mask in near) + CLOSE
    assert found.values == pytest.approx([at_the_average_of(q, mask) for mask in found.masks], abs=CLOSE)
    assert list(found.values) == sorted(found.values)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.booleans(), st.sampled_from([0.0, 0.05, 1.0]), st.integers(0, 10**6))
def test_of_many_sizes_every_subset_ends_where_no_exchange_is_better(n: int, psd: bool, slope: float, seed: int):
    q = random_surrogate(n, seed, psd=psd, slope=slope)
    best = {k: ranked(q, k)[0] for k in range(1, n + 1)}
    for k, mask in best_of_sizes(q, list(best)).items():
        near = [tuple(set(mask) - {i} | {j}) for i in mask for j in set(range(n)) - set(mask)]
        value = at_the_average_of(q, mask)
        assert len(set(mask)) == k and value >= at_the_average_of(q, best[k]) - CLOSE
        assert value <= min(at_the_average_of(q, other) for other in [mask, *near]) + CLOSE


def test_most_subsets_of_all_sizes_are_the_best_of_their_size():
    hits = 0
    for seed in range(10):
        q = random_surrogate(9, seed, slope=0.1)
        hits += sum(mask == ranked(q, k)[0] for k, mask in best_of_sizes(q, range(1, 10)).items())
    assert hits >= 0.8 * 90


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
@pytest.mark.parametrize("k", [10, 20])
def test_on_a_flat_surrogate_the_swap_search_returns_the_last_candidates(k: int):
    flat = Surrogate(2.0, torch.zeros(30, dtype=torch.float64), torch.zeros(30, 30, dtype=torch.float64), "exact")
    found = best_subsets(flat, k, 1)
    assert (found.masks, found.values) == ((tuple(range(30 - k, 30)),), (2.0,))


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


def test_invalid_arguments_are_refused():
    q = random_surrogate(4, 0)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"between 1 and 4, the number of candidates, not {k}"):
            best_subsets(q, k, 1)
    with pytest.raises(ValueError, match="the number of subsets must be at least 1"):
        best_subsets(q, 2, 0)
    for gradient_N, hessian_NN in ((q.gradient_N, q.hessian_NN * math.nan), (q.gradient_N / 0, q.hessian_NN)):
        with pytest.raises(ValueError, match="not finite"):
            Surrogate(0.0, gradient_N, hessian_NN, "exact")
