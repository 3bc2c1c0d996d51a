"""SeWA: which K of the N candidates to average, learned as a probabilistic mask.

Shape suffixes: N = candidates, K = chosen, M = Monte Carlo samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import Hessian, Learned, Objective, Score, Strategy, check_losses

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ckptavg.surrogate.subsets import Subsets

BLOCK = 256  # steps whose noise is drawn at once
DRAWS = 8  # masks that are scored between two steps of s, where there is no gradient
EDGE = 1e-3  # probabilities closer than this to 0 or 1 are sampled as if they were this far away


@dataclass(frozen=True, kw_only=True)
class SeWA:
    """Select K checkpoints with a mask learned by Gumbel-Softmax, and average them.

    The mask m ∈ {0,1}^N, Σ m_i = K, that minimises F(m) = E_B ℓ(Σ_i m_i w_i / Σ_i m_i; B) is sought by relaxing it to
    m_i ~ Bernoulli(s_i), s ∈ C = {0 ≤ s_i ≤ 1, Σ s_i ≤ K}, from s_i = K/N. Each step draws M binary Concrete samples
    m̃_i = σ((log(s_i/(1−s_i)) + g1 − g0)/τ), g0, g1 ~ Gumbel(0,1), and takes s ← Π_C(s − η·∇_s mean ℓ(w(m̃))). The
    temperature τ falls linearly. The answer is the K largest s_i, ties to the later, with coefficients 1/K.

    The paper fits the mask on training data (``--on train``); here validation data is the default, because a mask
    fitted on noisy training labels learns the noise. The authors' public code differs further: one Gumbel instead of
    two, straight-through always, τ = 1, AdamW on logits, no projection.

    References:
        Wang et al. 2025, SeWA: Selective Weight Average via Probabilistic Masking, arXiv:2502.10119. The estimator:
        Maddison, Mnih and Teh 2017, The Concrete Distribution, arXiv:1611.00712, equation 9. Constraint and
        projection: Zhou et al. 2021, ProbMask, CVPR.
    """

    needs_task: ClassVar[bool] = True

    k: Annotated[int | Literal["auto"], "How many checkpoints to average; auto with --solver quadratic."] = 5
    solver: Annotated[
        Literal["gumbel", "quadratic"], "Learn the mask step by step, or search the loss to second order in one pass."
    ] = "gumbel"
    hessian: Annotated[Hessian, "Curvature of the quadratic solver."] = "auto"
    verify: Annotated[int, "How many of the quadratic solver's best subsets are scored for real."] = 8
    steps: Annotated[int, "Optimisation steps of the mask."] = 200
    lr: Annotated[float, "Learning rate η of the probabilities s."] = 0.3
    samples: Annotated[int, "Monte Carlo samples M a step."] = 2
    tau_start: Annotated[float, "Temperature at the first step."] = 1.0
    tau_end: Annotated[float, "Temperature at the last step."] = 0.3
    on: Annotated[Literal["val", "train"] | None, "Data the mask is learned on; default val where the task has it."] = (
        None
    )
    straight_through: Annotated[bool, "Round the sampled mask to 0 or 1 in the forward pass."] = False
    evaluations: Annotated[int, "Scores to search by where there is no gradient (--score-cmd, --lm-eval)."] = 100

    def __post_init__(self) -> None:
        if self.k == "auto" and self.solver != "quadratic":
            raise UsageError("--k auto needs --solver quadratic, which answers for every K at once")
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
        if not objective.differentiable:
            return self._by_scores(objective, self.k)
        s_N = (objective.uniform() * self.k).clamp(max=1)
        losses = torch.empty(self.steps, dtype=s_N.dtype, device=s_N.device)
        for step, noise_MN in zip(range(self.steps), self._noise(objective, s_N), strict=False):
            tau = self.tau_start + (self.tau_end - self.tau_start) * step / max(1, self.steps - 1)
            s_N = s_N.detach().requires_grad_()
            mixtures = [self._mixture(s_N, noise_N, tau) for noise_N in noise_MN]
            loss = torch.stack([objective.loss(c_N, self.on) for c_N in mixtures])
            (gradient_N,) = torch.autograd.grad(loss.mean(), s_N)
            s_N = project_capped_simplex(s_N.detach() - self.lr * gradient_N, self.k)
            losses[step] = loss.detach().mean()
            objective.progress(
                "learning the mask", step + 1, self.steps, loss=losses[step], sure=s_N.topk(self.k).values.mean()
            )
        trace = losses.tolist()
        check_losses(trace)
        return Learned(
            coefficients=Coefficients.uniform(_likeliest(s_N, self.k), n),
            columns={"s": s_N.tolist()},
            trace={"loss": trace},
        )

    def _by_surrogate(self, objective: Objective) -> Learned:
        """The best subsets by the loss to second order around the mean of all, the best of them by their real loss.

        See `ckptavg.surrogate`. With ``--k auto`` the best subset of every size is scored, and then the best few of the
        size that won.
        """
        from ckptavg.surrogate.subsets import best_for_every_k

        if not objective.differentiable:
            raise UsageError(
                "the quadratic solver needs a loss, and here there are only scores", hint="--solver gumbel"
            )
        n = objective.n
        q = objective.surrogate(self.on, self.hessian)
        found = best_for_every_k(q, self.verify)
        scores: dict[tuple[int, ...], Score] = {}

        def loss(mask: tuple[int, ...]) -> float:
            scores[mask] = objective.score(Coefficients.uniform(mask, n))
            objective.progress("verifying subsets", len(scores), total, loss=scores[mask].loss or 0.0)
            return scores[mask].loss or 0.0

        k, total = self.k, self.verify
        if k == "auto":
            total += n - 1
            objective.expect([Coefficients.uniform(subsets.masks[0], n) for subsets in found.values()])
            first = {size: loss(subsets.masks[0]) for size, subsets in found.items()}
            k = max(first, key=lambda size: (scores[found[size].masks[0]].value, -first[size], size))
        objective.expect([Coefficients.uniform(mask, n) for mask in found[k].masks])
        chosen = min(found[k].masks, key=lambda mask: (loss(mask), [-i for i in reversed(mask)]))
        notes = [q.note] if q.note else []
        if found[k].proof == "heuristic":
            notes.append(f"the best subsets of {k} by the quadratic were found by a heuristic, without a proof")
        return Learned(
            coefficients=Coefficients.uniform(chosen, n),
            notes=notes,
            tables={"best subset of each size": _sizes(found, scores)},
        )

    def _by_scores(self, objective: Objective, k: int) -> Learned:
        """The mask by score-function gradients: as many scores as asked for, of K candidates each.

        Each step draws `DRAWS` masks m of exactly K candidates (the K largest of logit s_i + Gumbel noise) and takes
        s ← Π_C(s + η·mean_m A(m)·(m − s)), A(m) being the scores less their mean, by their standard deviation:
        REINFORCE with s(1−s)∇_s log p(m|s) = m − s as its direction, which does not explode at 0 and 1. The answer is
        the best mask of all that were scored; the likeliest one is scored last. Source: Williams 1992, Machine
        Learning 8.
        """
        import torch

        n, draws = objective.n, objective.generator
        s_N = torch.full((n,), k / n, dtype=torch.float64)
        found: dict[tuple[int, ...], float] = {}
        trace: list[float] = []
        while len(found) < min(self.evaluations, math.comb(n, k)) and len(trace) < self.evaluations:
            rest = self.evaluations - len(found)
            masks = [self._drawn(s_N, k, draws) for _ in range(min(DRAWS, rest - 1))] or [_likeliest(s_N, k)]
            objective.expect([Coefficients.uniform(mask, n) for mask in masks])
            scores = torch.tensor([self._scored(objective, mask, found) for mask in masks], dtype=torch.float64)
            m_MN = torch.zeros(len(masks), n, dtype=torch.float64)
            for row_N, mask in zip(m_MN, masks, strict=True):
                row_N[list(mask)] = 1
            spread = scores.std(unbiased=False).clamp(min=torch.finfo(scores.dtype).tiny)
            advantage_M = (scores - scores.mean()) / spread
            s_N = project_capped_simplex(s_N + self.lr * (advantage_M @ (m_MN - s_N)) / len(masks), k)
            trace.append(max(found.values()))
            objective.progress("searching by scores", len(found), self.evaluations, score=trace[-1])
        self._scored(objective, _likeliest(s_N, k), found)
        chosen = max(found, key=lambda mask: (found[mask], mask))
        return Learned(
            coefficients=Coefficients.uniform(chosen, n), columns={"s": s_N.tolist()}, trace={"best_score": trace}
        )

    def _drawn(self, s_N: Tensor, k: int, generator: torch.Generator) -> tuple[int, ...]:
        import torch

        noise_N = torch.rand(len(s_N), generator=generator, dtype=s_N.dtype).log().neg().log().neg()
        return tuple(sorted((torch.logit(s_N, eps=EDGE) + noise_N).topk(k).indices.tolist()))

    def _scored(self, objective: Objective, mask: tuple[int, ...], found: dict[tuple[int, ...], float]) -> float:
        if mask not in found:
            found[mask] = objective.score(Coefficients.uniform(mask, objective.n)).value
        return found[mask]

    def _noise(self, objective: Objective, s_N: Tensor) -> Iterator[Tensor]:
        """[M, N] of g1 − g0 for step after step; drawn on the CPU, the same for every device, and moved in blocks."""
        import torch

        while True:
            uniform = torch.rand(BLOCK, self.samples, objective.n, generator=objective.generator, dtype=torch.float64)
            yield from torch.logit(uniform, eps=1e-12).to(s_N)  # the difference of two Gumbels is logistic

    def _mixture(self, s_N: Tensor, noise_N: Tensor, tau: float) -> Tensor:
        """[N], m̃ / Σ m̃ for one binary Concrete sample m̃, differentiable in s."""
        import torch

        # clamped in value only: a clamp's own gradient is 0 outside, and s_i could never leave 0 or 1 again
        inner_N = s_N + (s_N.clamp(EDGE, 1 - EDGE) - s_N).detach()
        m_N = torch.sigmoid((torch.logit(inner_N) + noise_N) / tau)
        if self.straight_through:
            hard_N = (m_N > 0.5).to(m_N)
            m_N = torch.where(hard_N.sum() > 0, hard_N + m_N - m_N.detach(), m_N)  # never an empty mask
        return m_N / m_N.sum()


def _likeliest(s_N: Tensor, k: int) -> tuple[int, ...]:
    values = s_N.tolist()
    return tuple(sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[-k:]))


def _sizes(
    found: Mapping[int, Subsets], scores: Mapping[tuple[int, ...], Score]
) -> list[dict[str, float | str | None]]:
    """For each size its best subset: the loss by the quadratic, and the real one where it was measured."""
    rows: list[dict[str, float | str | None]] = []
    for size, subsets in found.items():
        real = scores.get(subsets.masks[0])
        metric = {} if real is None or real.metric is None else {"metric": real.metric}
        measured: dict[str, float | str | None] = {"loss": real and real.loss, **metric}
        rows.append({"K": size, "quadratic": subsets.values[0], **measured})
    return rows


def project_capped_simplex(s_N: Tensor, k: float) -> Tensor:
    """Euclidean projection of ``s_N`` onto C = {0 ≤ s ≤ 1, Σ s ≤ k}.

    It is clamp(s − ν, 0, 1) with ν = 0 where that sums to at most k, and otherwise the ν > 0 at which it sums to k.
    The sum is piecewise linear in ν with 2N breakpoints s_i and s_i − 1; they are sorted, the sum at each is found,
    and ν is interpolated exactly between the two that enclose k. O(N²) elementwise and without a host
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
