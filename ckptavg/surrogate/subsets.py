"""Find the best subsets of every size on the surrogate, with a proof of optimality if possible.

Shape suffixes: N = candidates, K = chosen, M = masks or nodes, A and B = parts of masks in either half of the
candidates.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ckptavg.surrogate import Surrogate
from ckptavg.surrogate.branch_and_bound import Relaxation, convexifier, prove
from ckptavg.surrogate.energy import Energy, Mask, Shortlist

Proof: TypeAlias = Literal["enumerated", "branch and bound", "heuristic"]

ENUMERATED = 2_000_000  # largest number of subsets to enumerate
NODES = 200_000  # limit of branch and bound; a count instead of a time, for reproducibility
CELLS = 2**21  # numbers in a block of the enumeration
DRAWS = 13  # random starts of the swap search


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """The best subsets of one size.

    Attributes:
        masks: positions of the chosen candidates, ascending; distinct, best first. Among masks whose values differ
            by rounding only, the mask with later candidates (the larger tuple) comes first.
        values: q at the uniform average over each.
        proof: ``enumerated`` and ``branch and bound`` mean that no other subset is better than these (to rounding);
            ``heuristic`` means that no better subset was found.
    """

    masks: tuple[Mask, ...]
    values: tuple[float, ...]
    proof: Proof


def best_subsets(q: Surrogate, k: int, count: int) -> Subsets:
    """Return the ``count`` subsets S of K candidates with the smallest q at their uniform average.

    With g and H centred (g ← Pg, H ← PHP, P = 1 − 11ᵀ/N: q is unchanged on Σβ = 1), q(1_S/K) = F + E(S)/2K²,
    E(S) = Σ_{i∈S} 2K·g_i + Σ_{i,j∈S} H_ij; and E of the complement is the same with −g, so at most N/2 are chosen.

    Up to `ENUMERATED` subsets are enumerated: E splits into a term of the half S ∩ {i < N/2}, a term of the other half
    and their product. Beyond that, a swap search finds good subsets and branch and bound tries to prove them optimal.
    Its lower bounds are relaxations to 0 ≤ x ≤ 1 of xᵀ(H − diag d)x + (2K·g + d)ᵀx, which is E if every x is
    0 or 1, and convex for the d of `convexifier`, whether H is positive semidefinite or not. A search that is not
    finished after `NODES` nodes ends as a heuristic, for example if very many subsets are nearly optimal. Of masks
    tied with the last one, branch and bound and the heuristic may have seen only some.

    Args:
        q: the surrogate.
        k: K, from 1 to N.
        count: largest number of subsets, ≥ 1.
    Raises:
        ValueError: if k or count is out of range, or q is not finite.
    References:
        Billionnet, Elloumi and Plateau 2009, Improving the performance of standard solvers for quadratic 0-1 programs
        by a tight convex reformulation: the QCR method, Discrete Applied Mathematics 157 (d by their SDP).
    """
    if not 1 <= k <= q.n:
        raise ValueError(f"the size of a subset must be between 1 and {q.n}, the number of candidates, not {k}")
    _check(q, count)
    return _best(q, k, count, NODES)[0]


def best_for_every_k(q: Surrogate, count: int) -> dict[int, Subsets]:
    """Return `best_subsets` of each size from 1 to N; sizes share the nodes, and unused nodes go to later sizes.

    Hard sizes are therefore more often heuristic here than in `best_subsets`.

    Args:
        q: the surrogate.
        count: largest number of subsets per size, ≥ 1.
    Raises:
        ValueError: if count is out of range, or q is not finite.
    """
    _check(q, count)
    found: dict[int, Subsets] = {}
    nodes, hard = NODES, sum(math.comb(q.n, k) > ENUMERATED for k in range(1, q.n + 1))
    shift_N = convexifier(Energy.of(q, 1).hessian_NN) if hard else None
    for k in range(1, q.n + 1):
        found[k], used = _best(q, k, count, nodes // max(1, hard), shift_N)
        nodes, hard = nodes - used, hard - (found[k].proof != "enumerated")
    return found


def _check(q: Surrogate, count: int) -> None:
    if count < 1:
        raise ValueError(f"the number of subsets must be at least 1, not {count}")
    if not bool(torch.isfinite(q.gradient_N).all() and torch.isfinite(q.hessian_NN).all()):
        raise ValueError("the gradient or second derivatives of the surrogate are not finite")


def _best(q: Surrogate, k: int, count: int, nodes: int, shift_N: Tensor | None = None) -> tuple[Subsets, int]:
    """Return the subsets and the number of nodes used."""
    energy = Energy.of(q, k)
    shortlist, used = Shortlist(energy, count), 0
    proof: Proof = "enumerated"
    if math.comb(q.n, k) <= ENUMERATED:
        _enumerate(energy, shortlist)
    else:
        relaxation = Relaxation.of(energy, convexifier(energy.hessian_NN) if shift_N is None else shift_N)
        relaxed_N = relaxation.minimum()
        _swap(energy, relaxed_N, shortlist)
        used = prove(relaxation, relaxed_N, shortlist, nodes)
        proof = "branch and bound" if used <= nodes else "heuristic"
    masks = [energy.candidates(chosen) for _, chosen in shortlist.found]
    values = [q.value + value / (2 * k * k) for value, _ in shortlist.found]
    return Subsets(masks=tuple(masks), values=tuple(values), proof=proof), min(used, nodes)


def _enumerate(energy: Energy, shortlist: Shortlist) -> None:
    """Enumerate all masks: for each a, those with a candidates of the first half, in blocks of rows and columns."""
    l_N, h_NN, first = energy.linear_N, energy.hessian_NN, energy.n // 2

    def lists(start: int, stop: int, size: int) -> Tensor:
        masks = torch.tensor(list(itertools.combinations(range(start, stop), size)), dtype=torch.long)
        return masks.flip(0) if energy.left_out else masks  # the last mask wins a tie: it leaves out the first ones

    def alone(at_MK: Tensor) -> Tensor:
        parts = [
            h_NN[at[:, :, None], at[:, None, :]].sum(dim=(1, 2))
            for at in at_MK.split(CELLS // (at_MK.shape[1] ** 2 + 1))
        ]
        return l_N[at_MK].sum(dim=1) + torch.cat(parts)

    for a in range(max(0, energy.k - (energy.n - first)), min(energy.k, first) + 1):
        rows_AK, columns_BK = lists(0, first, a), lists(first, energy.n, energy.k - a)
        e_A, e_B = alone(rows_AK), alone(columns_BK)
        for low, high in _blocks(len(e_B), CELLS // (energy.k - a + 1)):
            wide = max((high - low) * (energy.k - a), energy.n * a, 1)
            for top, bottom in _blocks(len(e_A), max(1, CELLS // wide)):
                field_AN = 2 * h_NN[rows_AK[top:bottom]].sum(dim=1)
                e_AB = e_A[top:bottom, None] + e_B[low:high] + field_AN[:, columns_BK[low:high]].sum(dim=-1)
                at_M = shortlist.least(e_AB.flatten())
                chosen = torch.cat([rows_AK[top + at_M // (high - low)], columns_BK[low + at_M % (high - low)]], dim=1)
                shortlist.add(e_AB.flatten()[at_M].tolist(), [tuple(mask) for mask in chosen.tolist()])


def _blocks(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def _swap(energy: Energy, relaxed_N: Tensor, shortlist: Shortlist) -> None:
    """Exchange one candidate for another while the best exchange lowers E, from several starts at once.

    The starts are the k largest of the relaxation, the last k, the greedy choice and seeded random masks.
    """
    n, k, h_NN = energy.n, energy.k, energy.hessian_NN
    diagonal_N = h_NN.diagonal()
    greedy_N = torch.zeros_like(relaxed_N)
    for size in range(1, k + 1):
        gain_N = energy.linear_N * (size / k) + 2 * h_NN @ greedy_N + diagonal_N
        greedy_N[gain_N.masked_fill(greedy_N > 0, math.inf).argmin()] = 1
    later_N = torch.arange(n).to(relaxed_N) * (-1 if energy.left_out else 1)
    random_MN = torch.rand(DRAWS, n, generator=torch.Generator().manual_seed(0), dtype=relaxed_N.dtype)
    order_MN = torch.cat([torch.stack([relaxed_N, later_N, greedy_N]), random_MN])
    x_MN = torch.zeros_like(order_MN).scatter(1, order_MN.topk(k).indices, 1)
    shortlist.see(x_MN)
    while len(x_MN):
        field_MN, chosen_MN = energy.linear_N + 2 * x_MN @ h_NN, x_MN > 0
        change_MNN = (diagonal_N - field_MN)[:, :, None] + (diagonal_N + field_MN)[:, None, :] - 2 * h_NN
        change_MNN.masked_fill_(~chosen_MN[:, :, None] | chosen_MN[:, None, :], math.inf)
        at_M = shortlist.least((energy(x_MN)[:, None, None] + change_MNN).flatten())
        shortlist.see(_exchanged(x_MN[at_M // n**2], at_M % n**2))
        lowest_M, at_M = change_MNN.flatten(1).min(dim=1)
        moving_M = lowest_M < -energy.rounding
        x_MN = _exchanged(x_MN[moving_M], at_M[moving_M])


def _exchanged(x_MN: Tensor, at_M: Tensor) -> Tensor:
    """Return the masks with candidate at // N removed and candidate at % N added."""
    n = x_MN.shape[1]
    return x_MN.scatter(1, (at_M // n)[:, None], 0).scatter(1, (at_M % n)[:, None], 1)
