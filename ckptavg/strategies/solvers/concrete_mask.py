"""Learn a mask of K candidates by gradients through its relaxation to binary Concrete samples.

Shape suffixes: N = candidates, K = chosen, M = Monte Carlo samples.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.objective import SCORED_ALONE, Losses, Objective, SelectBy, check_losses
from ckptavg.objective.selection import Selection
from ckptavg.score import Split
from ckptavg.strategies.solvers.swaps import SwapSearch, answer, falling_loss

BLOCK = 256  # steps whose noise is drawn at once
MEMORY = 0.99  # decay per step of the running mean of squared gradients
LEARNING = "learning the mask"
VERIFYING = "verifying subsets"
SHOWN = 48  # steps whose probabilities are kept for the report, at most
EDGE = 1e-3  # distance from 0 and 1 to which sampled probabilities are clamped


def learn_mask(
    objective: Objective, losses: Losses, k: int, *, on: Split | None, steps: int, lr: float, samples: int,
    tau: tuple[float, float], straight_through: bool,
) -> tuple[Tensor, Mapping[str, Sequence[Any]]]:  # fmt: skip
    """Descend on the probabilities s of the mask; return s, [N], and the trace of the search.

    The trace has the ``loss`` of each step, and the probabilities ``s`` after the steps ``s_step``, at most `SHOWN`.
    `ckptavg.strategies.sewa.SeWA` has the update. ``tau`` has the first and the last temperature. A loss that is not
    finite is a TaskError.
    """
    s_N = (losses.uniform() * k).clamp(max=1)
    means = torch.empty(steps, dtype=s_N.dtype, device=s_N.device)
    square = torch.zeros_like(means[0])
    kept: dict[int, Tensor] = {0: s_N}
    for step, noise_MN in zip(range(steps), _noise(samples, s_N, objective.generator), strict=False):
        temperature = tau[0] + (tau[1] - tau[0]) * step / max(1, steps - 1)
        s_N = s_N.detach().requires_grad_()
        mixtures = [sampled_mixture(s_N, noise_N, temperature, straight_through) for noise_N in noise_MN]
        loss = torch.stack([losses.loss(c_N, on) for c_N in mixtures])
        (gradient_N,) = torch.autograd.grad(loss.mean(), s_N)
        gradient_N = gradient_N - gradient_N.mean()
        square = MEMORY * square + (1 - MEMORY) * gradient_N.square().mean()
        root = (square / (1 - MEMORY ** (step + 1))).sqrt().clamp(min=torch.finfo(square.dtype).tiny)
        rate = lr * (1 - step / steps)
        s_N = project_capped_simplex(s_N.detach() - rate * gradient_N / root, k)
        means[step] = loss.detach().mean()
        if (step + 1) * SHOWN // steps > step * SHOWN // steps:
            kept[step + 1] = s_N
        objective.progress(LEARNING, step + 1, steps, loss=means[step], sure=s_N.topk(k).values.mean())
    trace = means.tolist()
    split = on or objective.scored_on
    check_losses(trace, losses.batches(split), split, samples=samples)
    shown = [[round(value, 4) for value in row] for row in torch.stack(list(kept.values())).tolist()]
    return s_N, {"loss": trace, "s_step": list(kept), "s": shown}


def choose(
    objective: Objective, losses: Losses, masks: Sequence[Coefficients], k: int, *, swaps: int, select_by: SelectBy
) -> tuple[Coefficients, list[str]]:
    """Score ``masks`` and every plain average, improve the best by swaps; return the best of all, and notes.

    The descents by swaps start from the best of the masks, from the K best single candidates, and from the best single
    candidate with the K−1 towards which the loss falls fastest: one start alone may end in a poor local minimum. Where
    the metric decides, the scores of the single candidates rank the swaps instead of the gradient of the loss.
    """
    n, on = objective.n, objective.scored_on
    selection = Selection(objective, select_by)
    singles, plain = Coefficients.singles(n), [Coefficients.uniform(range(n - k, n), n), selection.plain[-1]]
    objective.prefetch([*masks, *plain, *singles])
    selection.score([*masks, *plain], VERIFYING, len(masks) + 2)
    selection.score(singles, SCORED_ALONE.name, n)

    def values(mask: Coefficients) -> Sequence[float]:
        if selection.by == "metric":
            return [selection.scores[single].value for single in singles]
        return falling_loss(losses, mask, on)

    search = SwapSearch(selection, values, swaps)
    search.descend(selection.best(masks))
    rank = selection.ranking()
    order = sorted(range(n), key=lambda i: rank(singles[i]), reverse=True)
    search.descend(Coefficients.uniform(order[:k], n))
    towards = values(singles[order[0]]) if k > 1 and search.left else ()
    order[1:] = sorted(order[1:], key=lambda i: towards[i], reverse=True) if towards else order[1:]
    search.descend(Coefficients.uniform(order[:k], n))
    return answer(selection, k)


def _noise(samples: int, s_N: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield g1 − g0 as [M, N] for each step; drawn on the CPU so that devices agree, moved in blocks."""
    while True:
        uniform = torch.rand(BLOCK, samples, len(s_N), generator=generator, dtype=torch.float64)
        yield from torch.logit(uniform, eps=1e-12).to(s_N)  # the difference of two Gumbels is logistic


def sampled_mixture(s_N: Tensor, noise_N: Tensor, tau: float, straight_through: bool) -> Tensor:
    """Return [N], m̃ / Σ m̃ for one binary Concrete sample m̃, differentiable in s."""
    # clamp the value only: the gradient of a clamp is 0 outside, so s_i could never leave 0 or 1 again
    inner_N = s_N + (s_N.clamp(EDGE, 1 - EDGE) - s_N).detach()
    m_N = torch.sigmoid((torch.logit(inner_N) + noise_N) / tau)
    if straight_through:
        hard_N = (m_N > 0.5).to(m_N)
        m_N = torch.where(hard_N.sum() > 0, hard_N + m_N - m_N.detach(), m_N)  # never an empty mask
    return m_N / m_N.sum()


def likeliest(s_N: Tensor, k: int, count: int) -> list[tuple[int, ...]]:
    """Return the ``count`` masks of ``k`` candidates (all, if fewer) with the largest Σ logit s_i, best first.

    With candidates in falling order of logit s, the successors of a mask move one member one place down; every mask
    is reachable from the first, and no mask is better than its predecessor.
    """
    values = torch.logit(s_N, eps=EDGE).tolist()
    order = sorted(range(len(values)), key=lambda i: (values[i], s_N[i], i), reverse=True)
    first = tuple(range(k))
    heap, seen = [(0.0, first)], {first}
    masks: list[tuple[int, ...]] = []
    while heap and len(masks) < count:
        behind, places = heapq.heappop(heap)
        masks.append(tuple(sorted(order[place] for place in places)))
        for j, place in enumerate(places):
            later = (*places[:j], place + 1, *places[j + 1 :])
            if place + 1 < len(order) and place + 1 not in places and later not in seen:
                seen.add(later)
                heapq.heappush(heap, (behind + values[order[place]] - values[order[place + 1]], later))
    return masks


def project_capped_simplex(s_N: Tensor, k: float) -> Tensor:
    """Project ``s_N`` onto C = {0 ≤ s ≤ 1, Σ s ≤ k} in the Euclidean norm; k > 0.

    The projection is clamp(s − ν, 0, 1) with ν = 0 if that sums to at most k, else with the ν > 0 that gives sum k.
    The sum is piecewise linear in ν with 2N breakpoints s_i and s_i − 1; they are sorted, the sum at each is
    computed, and ν is interpolated exactly between the two that enclose k. O(N²) elementwise and without a host
    synchronisation.

    References:
        Wang and Lu 2015, arXiv:1503.01002; SeWA (arXiv:2502.10119), the set C.
    """
    nu = torch.cat([s_N, s_N - 1, s_N.new_zeros(1)]).clamp(min=0).sort().values
    sums = (s_N - nu.unsqueeze(1)).clamp(0, 1).sum(dim=1)  # falls as ν grows, to 0 at the largest breakpoint
    low = ((sums > k).sum() - 1).clamp(min=0)  # the last breakpoint with a sum above k
    high = (low + 1).clamp(max=len(nu) - 1)  # `take` below, because nu[low] would wait for the device
    nu_low, nu_high, sum_low, sum_high = nu.take(low), nu.take(high), sums.take(low), sums.take(high)
    slope = (sum_low - sum_high).clamp(min=torch.finfo(s_N.dtype).tiny)
    root = nu_low + (sum_low - k) / slope * (nu_high - nu_low)
    return (s_N - torch.where(sums[0] > k, root, torch.zeros_like(root))).clamp(0, 1)
