"""Find the best subsets of one size on the surrogate, by enumeration or by a search over exchanges.

Shape suffixes: N = candidates, K = chosen, M = masks, C = exchanges of a mask, A and B = parts of masks in either half
of the candidates.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ckptavg.surrogate import Surrogate

Mask: TypeAlias = tuple[int, ...]

ENUMERATED = 2_000_000  # largest number of subsets to enumerate
CELLS = 2**21  # numbers in a block of the enumeration
DRAWS = 30  # random starts of the swap search
ROUNDING = 2.0**-48  # fraction of the largest possible energy below which differences are ties


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """The best subsets of one size.

    Attributes:
        masks: positions of the chosen candidates, ascending; distinct, best first. Among masks whose values differ
            by rounding only, the mask with later candidates (the larger tuple) comes first.
        values: q at the uniform average over each.
        proof: ``enumerated`` means that no other subset is better than these (to rounding), ``heuristic`` that no
            better subset was found.
    """

    masks: tuple[Mask, ...]
    values: tuple[float, ...]
    proof: Literal["enumerated", "heuristic"]


def best_subsets(q: Surrogate, k: int, count: int) -> Subsets:
    """Return the ``count`` subsets S of K candidates with the smallest q at their uniform average.

    With g and H centred (g ← Pg, H ← PHP, P = 1 − 11ᵀ/N: q is unchanged on Σβ = 1), q(1_S/K) = F + E(S)/2K²,
    E(S) = Σ_{i∈S} 2K·g_i + Σ_{i,j∈S} H_ij; and E of the complement is the same with −g, so at most N/2 are chosen.

    Up to `ENUMERATED` subsets are enumerated: E splits into a term of the half S ∩ {i < N/2}, a term of the other half
    and their product. Beyond that, a swap search looks for them, and of masks tied with the last one it may have seen
    only some. On surrogates of real trainings it found the subsets that enumeration finds
    (``scripts/benchmark/subsets.py``).

    Raises:
        ValueError: if k, which is K, is not from 1 to N, or ``count`` is less than 1.
    """
    if not 1 <= k <= q.n:
        raise ValueError(f"the size of a subset must be between 1 and {q.n}, the number of candidates, not {k}")
    if count < 1:
        raise ValueError(f"the number of subsets must be at least 1, not {count}")
    energy, few = _Energy(q, k), math.comb(q.n, k) <= ENUMERATED
    shortlist = (_enumerate if few else _swap)(energy, count)
    return Subsets(
        masks=tuple(energy.candidates(chosen) for _, chosen in shortlist.found),
        values=tuple(q.value + value / (2 * k * k) for value, _ in shortlist.found),
        proof="enumerated" if few else "heuristic",
    )


class _Energy:
    """E(S) = Σ_{i∈S} l_i + Σ_{i,j∈S} H_ij of ``k`` candidates: the chosen or the left-out ones, whichever are fewer.

    q at the uniform average of K chosen candidates is F + E/2K²; l = ±2K·g and H are centred.
    """

    def __init__(self, q: Surrogate, chosen: int) -> None:
        g_N, h_NN, mean_N = q.gradient_N, q.hessian_NN, q.hessian_NN.mean(dim=0)
        self.n = q.n
        self.left_out = 2 * chosen > q.n
        self.k = q.n - chosen if self.left_out else chosen
        self.linear_N = (-2 * chosen if self.left_out else 2 * chosen) * (g_N - g_N.mean())
        self.hessian_NN = h_NN - mean_N - mean_N[:, None] + mean_N.mean()
        scale = self.k * 2 * chosen * float(g_N.abs().max()) + self.k * self.k * float(h_NN.abs().max())
        self.rounding = ROUNDING * scale + 1e-300  # energies that differ by less count as equal

    def __call__(self, x_MN: Tensor) -> Tensor:
        """Return [M], E of each row of [M, N]."""
        return x_MN @ self.linear_N + ((x_MN @ self.hessian_NN) * x_MN).sum(dim=-1)

    def candidates(self, chosen: Mask) -> Mask:
        """Return the averaged candidates of a mask."""
        return tuple(i for i in range(self.n) if i not in chosen) if self.left_out else chosen


class _Shortlist:
    """The ``count`` best masks seen so far."""

    def __init__(self, energy: _Energy, count: int) -> None:
        self.energy = energy
        self.count = count
        self.found: list[tuple[float, Mask]] = []

    def least(self, e_M: Tensor) -> Tensor:
        """Return the positions of the ``count`` smallest energies that would be listed; the last of ties."""
        last = float(e_M.kthvalue(min(self.count, len(e_M))).values)
        if len(self.found) == self.count:
            last = min(last, self.found[-1][0])
        tied_M = ((e_M >= last) & (e_M <= last + self.energy.rounding)).nonzero()[-self.count :, 0]
        return torch.cat([(e_M < last).nonzero()[:, 0], tied_M])

    def add(self, energies: Iterable[float], masks: Iterable[Mask]) -> None:
        """Insert masks; energies within rounding of the first of their run tie, and the later candidates win."""
        known = dict(zip(masks, energies, strict=True)) | {mask: energy for energy, mask in self.found}
        ties: list[tuple[float, Mask]] = []
        self.found = []
        for entry in sorted([*((energy, mask) for mask, energy in known.items()), (math.inf, ())]):
            if ties and entry[0] > ties[0][0] + self.energy.rounding:
                self.found += sorted(ties, key=lambda tie: self.energy.candidates(tie[1]), reverse=True)
                ties = []
                if len(self.found) >= self.count:
                    break
            ties.append(entry)
        del self.found[self.count :]


def _enumerate(energy: _Energy, count: int) -> _Shortlist:
    """Enumerate all masks: for each a, those with a candidates of the first half, in blocks of rows and columns."""
    l_N, h_NN, first = energy.linear_N, energy.hessian_NN, energy.n // 2
    shortlist = _Shortlist(energy, count)

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
                shortlist.add(e_AB.flatten()[at_M].tolist(), map(tuple, chosen.tolist()))
    return shortlist


def _blocks(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def _swap(energy: _Energy, count: int) -> _Shortlist:
    """Exchange one candidate for another while the best exchange lowers E, from several starts at once.

    The starts are the last k, the greedy choice and seeded random masks. The search then goes on from every listed
    mask, until the list has all masks that are better than its last and one exchange from another in it.
    """
    n, k, h_NN = energy.n, energy.k, energy.hessian_NN
    diagonal_N = h_NN.diagonal()
    greedy_N = torch.zeros_like(diagonal_N)
    for size in range(1, k + 1):
        gain_N = energy.linear_N * (size / k) + 2 * h_NN @ greedy_N + diagonal_N
        greedy_N[gain_N.masked_fill(greedy_N > 0, math.inf).argmin()] = 1
    later_N = torch.arange(n).to(greedy_N) * (-1 if energy.left_out else 1)
    random_MN = torch.rand(DRAWS, n, generator=torch.Generator().manual_seed(0), dtype=greedy_N.dtype)
    order_MN = torch.cat([torch.stack([later_N, greedy_N]), random_MN])
    x_MN = torch.zeros_like(order_MN).scatter(1, order_MN.topk(k).indices, 1)
    shortlist, expanded = _Shortlist(energy, count), set[Mask]()
    while len(x_MN):
        field_MN, chosen_MN = energy.linear_N + 2 * x_MN @ h_NN, x_MN > 0
        change_MNN = (diagonal_N - field_MN)[:, :, None] + (diagonal_N + field_MN)[:, None, :] - 2 * h_NN
        change_MNN.masked_fill_(~chosen_MN[:, :, None] | chosen_MN[:, None, :], math.inf)
        change_MC, at_MC = change_MNN.flatten(1).topk(min(count, k * (n - k)), largest=False)
        near_MN = _exchanged(x_MN.repeat_interleave(at_MC.shape[1], dim=0), at_MC.flatten())
        seen_MN = torch.cat([x_MN, near_MN])
        shortlist.add(energy(seen_MN).tolist(), map(tuple, seen_MN.nonzero()[:, 1].view(-1, k).tolist()))
        falling_M = change_MC[:, 0] < -energy.rounding
        x_MN = _exchanged(x_MN[falling_M], at_MC[falling_M, 0]).unique(dim=0)
        if not len(x_MN):
            new = [mask for _, mask in shortlist.found if mask not in expanded]
            expanded.update(new)
            x_MN = x_MN.new_zeros(len(new), n).scatter(1, torch.tensor(new, dtype=torch.long).view(-1, k), 1)
    return shortlist


def _exchanged(x_MN: Tensor, at_M: Tensor) -> Tensor:
    """Return the masks with candidate at // N removed and candidate at % N added."""
    n = x_MN.shape[1]
    return x_MN.scatter(1, (at_M // n)[:, None], 0).scatter(1, (at_M % n)[:, None], 1)


def best_of_sizes(q: Surrogate, sizes: Sequence[int]) -> dict[int, Mask]:
    """Return K → the best subset of K candidates found by exchanges, of many sizes at once.

    Greedy subsets are improved by the best exchange of one candidate for another until none lowers q. A heuristic:
    `best_subsets` searches one size from many starts.
    """
    g_N, h_NN, grown = q.gradient_N, q.hessian_NN, _grown(q)
    k_M = torch.tensor(sizes, dtype=g_N.dtype)
    x_MN = torch.zeros(len(sizes), q.n, dtype=g_N.dtype)
    for row_N, k in zip(x_MN, sizes, strict=True):
        row_N[grown[:k]] = 1
    diagonal_N = h_NN.diagonal()
    at_work_M = torch.arange(len(sizes))
    while len(at_work_M):
        still: list[Tensor] = []
        for at_M in at_work_M.split(max(1, CELLS // q.n**2)):
            chosen_MN = x_MN[at_M] > 0
            slope_MN = 2 * (k_M[at_M, None] * (g_N - h_NN.mean(dim=0)) + x_MN[at_M] @ h_NN)
            out_MN = (diagonal_N - slope_MN).masked_fill(~chosen_MN, math.inf)
            in_MN = (diagonal_N + slope_MN).masked_fill(chosen_MN, math.inf)
            change_MNN = out_MN[:, :, None] + in_MN[:, None, :] - 2 * h_NN
            change_M, swap_M = change_MNN.flatten(1).min(dim=1)
            better_M = change_M < -ROUNDING * (k_M[at_M] ** 2 * h_NN.abs().max() + k_M[at_M] * g_N.abs().max())
            x_MN[at_M[better_M]] = _exchanged(x_MN[at_M[better_M]], swap_M[better_M])
            still.append(at_M[better_M])
        at_work_M = torch.cat(still)
    return {k: tuple(row_N.nonzero()[:, 0].tolist()) for k, row_N in zip(sizes, x_MN, strict=True)}


def _grown(q: Surrogate) -> list[int]:
    """Return the candidates in the order in which each lowers q at the uniform average most."""
    h_NN, slope_N = q.hessian_NN, q.gradient_N - q.hessian_NN.mean(dim=0)
    sum_N, order = torch.zeros_like(slope_N), list[int]()
    inner, linear = 0.0, 0.0  # xᵀHx and the slopes' sum of the subset so far
    left_N = torch.zeros(q.n, dtype=torch.bool)
    for k in range(1, q.n + 1):
        bent_N = inner + 2 * sum_N + h_NN.diagonal()
        value_N = (linear + slope_N) / k + bent_N / (2 * k * k)
        best = int(value_N.masked_fill(left_N, math.inf).argmin())
        inner, linear = float(bent_N[best]), linear + float(slope_N[best])
        sum_N, left_N[best] = sum_N + h_NN[best], True
        order.append(best)
    return order
