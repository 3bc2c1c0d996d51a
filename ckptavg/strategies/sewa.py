"""SeWA: learn a probabilistic mask that selects the K of N candidates to average.

Shape suffixes: N = candidates, K = chosen, M = Monte Carlo samples.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import Hessian, Learned, Objective, Strategy, check_losses, losses_of
from ckptavg.score import Score

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ckptavg.surrogate.subsets import Subsets

BLOCK = 256  # steps whose noise is drawn at once
DRAWS = 8  # masks scored per step of s when there is no gradient
MOVES = 5  # times the quadratic is moved to the best subset so far
MEMORY = 0.99  # decay per step of the running mean of squared gradients
EDGE = 1e-3  # distance from 0 and 1 to which sampled probabilities are clamped


@dataclass(frozen=True, kw_only=True)
class SeWA(Strategy):
    """Select K checkpoints with a mask learned by Gumbel-Softmax, and average them.

    The mask m ∈ {0,1}^N, Σ m_i = K, should minimise F(m) = E_B ℓ(Σ_i m_i w_i / Σ_i m_i; B). It is relaxed to
    m_i ~ Bernoulli(s_i), s ∈ C = {0 ≤ s_i ≤ 1, Σ s_i ≤ K}, from s_i = K/N. Each step draws M binary Concrete samples
    m̃_i = σ((log(s_i/(1−s_i)) + g1 − g0)/τ), g0, g1 ~ Gumbel(0,1), and takes s ← Π_C(s − η·∇_s mean ℓ(w(m̃))). The
    temperature τ falls linearly. The most probable masks of K, those with the largest Σ logit s_i (ties to the later),
    are scored, and the mask with the lowest loss is returned, with coefficients 1/K.

    Differs from the paper in three ways. The gradient, less its mean, is divided by the root of the running mean of its
    squares, and η falls linearly to 0: loss differences between candidates vary by orders of magnitude between tasks,
    so no single η would suit all of them. The paper takes the K largest s_i without scoring (``--verify 1``); the
    relaxation is slightly inexact, and a few scores are cheap. The paper fits the mask on training data
    (``--on train``); here validation data is the default, because a mask fitted on noisy training labels learns the
    noise. The authors' public code differs further: one Gumbel instead of two, straight-through always, τ = 1, AdamW on
    logits, no projection.

    References:
        Wang et al. 2025, SeWA: Selective Weight Average via Probabilistic Masking, arXiv:2502.10119. The estimator:
        Maddison, Mnih and Teh 2017, The Concrete Distribution, arXiv:1611.00712, equation 9. Constraint and
        projection: Zhou et al. 2021, ProbMask, CVPR.
    """

    k: Annotated[int | Literal["auto"], "Checkpoints to average; auto if quadratic."] = 5
    solver: Annotated[Literal["gumbel", "quadratic"], "Gradient steps or a quadratic model."] = "gumbel"
    hessian: Annotated[Hessian, "Second derivatives to use.", "quadratic solver"] = "auto"
    verify: Annotated[int, "How many of the solver's best subsets to score.", "both solvers"] = 8
    steps: Annotated[int, "Optimisation steps of the mask.", "gumbel solver"] = 100
    lr: Annotated[float, "Learning rate η ≈ size of the first steps.", "gumbel solver"] = 0.05
    samples: Annotated[int, "Monte Carlo samples M per step.", "gumbel solver"] = 2
    tau_start: Annotated[float, "Temperature at the first step.", "gumbel solver"] = 1.0
    tau_end: Annotated[float, "Temperature at the last step.", "gumbel solver"] = 0.3
    on: Annotated[
        Literal["val", "train"] | None, "Data to learn the mask on; default val if the task has it.", "both solvers"
    ] = None
    straight_through: Annotated[bool, "Round the sampled mask to 0 or 1 in the forward pass.", "gumbel solver"] = False
    evaluations: Annotated[int, "Scores to spend with --score-cmd or --lm-eval.", "search by scores"] = 100

    def __post_init__(self) -> None:
        if self.k == "auto" and self.solver != "quadratic":
            raise UsageError("--k auto needs --solver quadratic, which solves for every K at once")
        for name in ("k", "steps", "samples", "evaluations", "verify"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "tau_start", "tau_end"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} must be greater than 0, not {getattr(self, name)}")

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        import torch

        n = objective.n
        if self.k != "auto" and self.k > n:
            raise UsageError(
                f"--k {self.k} asks for more checkpoints than the {n} candidates there are",
                hint=f"choose --k {n} or less, or widen the window (--last, --start, --stop, --every)",
            )
        if self.solver == "quadratic":
            return self._by_surrogate(objective)
        assert self.k != "auto"
        if not (objective.losses is not None):
            return self._by_scores(objective, self.k)
        s_N = (losses_of(objective).uniform() * self.k).clamp(max=1)
        losses = torch.empty(self.steps, dtype=s_N.dtype, device=s_N.device)
        square = torch.zeros_like(losses[0])
        for step, noise_MN in zip(range(self.steps), self._noise(objective, s_N), strict=False):
            tau = self.tau_start + (self.tau_end - self.tau_start) * step / max(1, self.steps - 1)
            s_N = s_N.detach().requires_grad_()
            mixtures = [self._mixture(s_N, noise_N, tau) for noise_N in noise_MN]
            loss = torch.stack([losses_of(objective).loss(c_N, self.on) for c_N in mixtures])
            (gradient_N,) = torch.autograd.grad(loss.mean(), s_N)
            gradient_N = gradient_N - gradient_N.mean()
            square = MEMORY * square + (1 - MEMORY) * gradient_N.square().mean()
            root = (square / (1 - MEMORY ** (step + 1))).sqrt().clamp(min=torch.finfo(square.dtype).tiny)
            rate = self.lr * (1 - step / self.steps)
            s_N = project_capped_simplex(s_N.detach() - rate * gradient_N / root, self.k)
            losses[step] = loss.detach().mean()
            objective.progress(
                "learning the mask", step + 1, self.steps, loss=losses[step], sure=s_N.topk(self.k).values.mean()
            )
        trace = losses.tolist()
        check_losses(
            trace,
            losses_of(objective).batches(self.on or objective.scored_on),
            self.on or objective.scored_on,
            samples=self.samples,
        )
        masks = likeliest(s_N, self.k, self.verify)
        if self.verify > 1:
            objective.prefetch([Coefficients.uniform(mask, n) for mask in masks])
        chosen = _Verified(objective, self.verify).best(masks) if self.verify > 1 else masks[0]
        return Learned(coefficients=Coefficients.uniform(chosen, n), columns={"s": s_N.tolist()}, trace={"loss": trace})

    def _by_surrogate(self, objective: Objective) -> Learned:
        """Return the best of ``verify`` subsets by real loss, each chosen as the best on the quadratic when scored.

        See `ckptavg.surrogate`. With ``--k auto`` the best subset of every size is scored first, and all others have
        the size that won; subsets are scored by loss, which is what the quadratic predicts. Whenever a subset is better
        than all before it, the quadratic is recentered there: value and gradient of the real loss at the subset, with
        the second derivatives kept, at the cost of a forward and a backward pass. Without recentering, the best subset
        of a network in a wide valley may rank only hundredth on the quadratic around the mean.
        """
        import torch

        from ckptavg.surrogate.subsets import best_for_every_k, best_subsets

        if not (objective.losses is not None):
            raise UsageError("the quadratic solver needs a loss, not scores alone", hint="--solver gumbel")
        n = objective.n
        q = losses_of(objective).surrogate(self.on, self.hessian)
        found = best_for_every_k(q, 1)
        k, auto = self.k, self.k == "auto"
        verified = _Verified(objective, self.verify + auto * (n - 1))
        if k == "auto":
            objective.prefetch([Coefficients.uniform(subsets.masks[0], n) for subsets in found.values()])
            first = {size: verified.loss(subsets.masks[0]) for size, subsets in found.items()}
            k = min(first, key=lambda size: (first[size], -size))
        tried, near, moves = list[tuple[int, ...]](), found[k].masks, 0
        chosen = None
        while len(tried) < self.verify:
            fresh = [mask for mask in near if mask not in tried]
            if not fresh:
                break
            tried.append(fresh[0])
            better = verified.best(tried)
            if better != chosen and moves < MOVES and len(tried) < self.verify:
                mixture, moves = Coefficients.uniform(better, n), moves + 1
                q = q.recentered(
                    torch.tensor(mixture.values[0], dtype=torch.float64),
                    *losses_of(objective).gradient(mixture, self.on),
                )
                near = best_subsets(q, k, self.verify).masks
            chosen = better
        assert chosen is not None
        if auto:
            chosen = verified.best(verified.scores)  # of another size if none of these is better
        notes = [q.note] if q.note else []
        if found[k].proof == "heuristic":
            notes.append(f"the best subsets of {k} on the quadratic come from a heuristic, without proof of optimality")
        return Learned(
            coefficients=Coefficients.uniform(chosen, n),
            notes=notes,
            tables={"best subset of each size": _sizes(found, verified.scores)},
        )

    def _by_scores(self, objective: Objective, k: int) -> Learned:
        """Learn the mask by score-function gradients from ``evaluations`` scores of K candidates each.

        Each step draws `DRAWS` masks m of exactly K candidates (the K largest of logit s_i + Gumbel noise) and takes
        s ← Π_C(s + η·Σ_m A(m)·(m − s)), A(m) being the scores less their mean, the sum brought to a mean square of 1:
        REINFORCE with the direction s(1−s)∇_s log p(m|s) = m − s, which stays bounded at 0 and 1. The result is the
        best of all scored masks; the most probable mask is scored last. Source: Williams 1992, Machine
        Learning 8.
        """
        import torch

        n, draws = objective.n, objective.generator
        s_N = torch.full((n,), k / n, dtype=torch.float64)
        scored: dict[tuple[int, ...], float] = {}
        trace: list[float] = []
        while len(scored) < min(self.evaluations, math.comb(n, k)) and len(trace) < self.evaluations:
            rest = self.evaluations - len(scored)
            masks = [self._drawn(s_N, k, draws) for _ in range(min(DRAWS, rest - 1))] or likeliest(s_N, k, 1)
            objective.prefetch([Coefficients.uniform(mask, n) for mask in masks])
            scores = torch.tensor([self._scored(objective, mask, scored) for mask in masks], dtype=torch.float64)
            m_MN = torch.zeros(len(masks), n, dtype=torch.float64)
            for row_N, mask in zip(m_MN, masks, strict=True):
                row_N[list(mask)] = 1
            if (finite := scores[scores.isfinite()]).numel():
                scores = scores.clamp(min=finite.min())  # −∞ would make every difference infinite
            else:
                scores = torch.zeros_like(scores)
            ascent_N = (scores - scores.mean()) @ (m_MN - s_N)
            root = ascent_N.square().mean().sqrt().clamp(min=torch.finfo(scores.dtype).tiny)
            s_N = project_capped_simplex(s_N + self.lr * ascent_N / root, k)
            trace.append(max(scored.values()))
            objective.progress("searching by scores", len(scored), self.evaluations, score=trace[-1])
        self._scored(objective, likeliest(s_N, k, 1)[0], scored)
        chosen = max(scored, key=lambda mask: (scored[mask], mask))
        return Learned(
            coefficients=Coefficients.uniform(chosen, n), columns={"s": s_N.tolist()}, trace={"best_score": trace}
        )

    def _drawn(self, s_N: Tensor, k: int, generator: torch.Generator) -> tuple[int, ...]:
        import torch

        noise_N = torch.rand(len(s_N), generator=generator, dtype=s_N.dtype).log().neg().log().neg()
        return tuple(sorted((torch.logit(s_N, eps=EDGE) + noise_N).topk(k).indices.tolist()))

    def _scored(self, objective: Objective, mask: tuple[int, ...], scored: dict[tuple[int, ...], float]) -> float:
        if mask not in scored:
            scored[mask] = objective.score(Coefficients.uniform(mask, objective.n)).value
        return scored[mask]

    def _noise(self, objective: Objective, s_N: Tensor) -> Iterator[Tensor]:
        """Yield g1 − g0 as [M, N] for each step; drawn on the CPU so that devices agree, moved in blocks."""
        import torch

        while True:
            uniform = torch.rand(BLOCK, self.samples, objective.n, generator=objective.generator, dtype=torch.float64)
            yield from torch.logit(uniform, eps=1e-12).to(s_N)  # the difference of two Gumbels is logistic

    def _mixture(self, s_N: Tensor, noise_N: Tensor, tau: float) -> Tensor:
        """Return [N], m̃ / Σ m̃ for one binary Concrete sample m̃, differentiable in s."""
        import torch

        # clamp the value only: the gradient of a clamp is 0 outside, so s_i could never leave 0 or 1 again
        inner_N = s_N + (s_N.clamp(EDGE, 1 - EDGE) - s_N).detach()
        m_N = torch.sigmoid((torch.logit(inner_N) + noise_N) / tau)
        if self.straight_through:
            hard_N = (m_N > 0.5).to(m_N)
            m_N = torch.where(hard_N.sum() > 0, hard_N + m_N - m_N.detach(), m_N)  # never an empty mask
        return m_N / m_N.sum()


class _Verified:
    """Cache of the real scores of subsets, each measured once.

    Args:
        objective: scores the subsets.
        total: largest number of subsets, for the progress bar.
    """

    def __init__(self, objective: Objective, total: int) -> None:
        self.scores: dict[tuple[int, ...], Score] = {}
        self._objective = objective
        self._total = total

    def loss(self, mask: tuple[int, ...]) -> float:
        """Return the loss of the uniform average over ``mask``."""
        if mask not in self.scores:
            score = self.scores[mask] = self._objective.score(Coefficients.uniform(mask, self._objective.n))
            self._objective.progress("verifying subsets", len(self.scores), self._total, loss=score.loss or 0.0)
        return self.scores[mask].loss or 0.0

    def best(self, masks: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the mask with the lowest loss; ties go to the later candidates."""
        return min(masks, key=lambda mask: (self.loss(mask), [-i for i in reversed(mask)]))


def likeliest(s_N: Tensor, k: int, count: int) -> list[tuple[int, ...]]:
    """Return the ``count`` masks of ``k`` candidates (all, if fewer) with the largest Σ logit s_i, best first.

    With candidates in falling order of logit s, the successors of a mask move one member one place down; every mask
    is reachable from the first, and no mask is better than its predecessor.
    """
    import torch

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


def _sizes(
    found: Mapping[int, Subsets], scores: Mapping[tuple[int, ...], Score]
) -> list[dict[str, float | str | None]]:
    """Return a row per size: loss of the best subset on the quadratic at the mean, and its real loss if scored."""
    rows: list[dict[str, float | str | None]] = []
    for size, subsets in found.items():
        real = scores.get(subsets.masks[0])
        metric = {} if real is None or real.metric is None else {"metric": real.metric}
        measured: dict[str, float | str | None] = {"loss": real and real.loss, **metric}
        rows.append({"K": size, "quadratic": subsets.values[0], **measured})
    return rows


def project_capped_simplex(s_N: Tensor, k: float) -> Tensor:
    """Project ``s_N`` onto C = {0 ≤ s ≤ 1, Σ s ≤ k} in the Euclidean norm.

    The projection is clamp(s − ν, 0, 1) with ν = 0 if that sums to at most k, else with the ν > 0 that gives sum k.
    The sum is piecewise linear in ν with 2N breakpoints s_i and s_i − 1; they are sorted, the sum at each is
    computed, and ν is interpolated exactly between the two that enclose k. O(N²) elementwise and without a host
    synchronisation.

    Args:
        s_N: [N], any real values.
        k: the cap on the sum, > 0.
    Returns:
        [N], of the same dtype and device.
    Raises:
        ValueError: if k ≤ 0.
    References:
        Wang and Lu 2015, arXiv:1503.01002; SeWA (arXiv:2502.10119), the set C.
    """
    import torch

    if k <= 0:
        raise ValueError(f"the cap must be positive, not {k}")
    nu = torch.cat([s_N, s_N - 1, s_N.new_zeros(1)]).clamp(min=0).sort().values
    sums = (s_N - nu.unsqueeze(1)).clamp(0, 1).sum(dim=1)  # falls as ν grows, to 0 at the largest breakpoint
    low = ((sums > k).sum() - 1).clamp(min=0)  # the last breakpoint with a sum above k
    high = (low + 1).clamp(max=len(nu) - 1)  # `take` below, because nu[low] would wait for the device
    nu_low, nu_high, sum_low, sum_high = nu.take(low), nu.take(high), sums.take(low), sums.take(high)
    slope = (sum_low - sum_high).clamp(min=torch.finfo(s_N.dtype).tiny)
    root = nu_low + (sum_low - k) / slope * (nu_high - nu_low)
    return (s_N - torch.where(sums[0] > k, root, torch.zeros_like(root))).clamp(0, 1)


STRATEGY: type[Strategy] = SeWA
