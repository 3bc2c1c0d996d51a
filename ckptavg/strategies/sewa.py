"""SeWA: learn a probabilistic mask that selects the K of N candidates to average.

Shape suffixes: N = candidates, K = chosen, M = Monte Carlo samples.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import (
    SCORED_ALONE,
    Hessian,
    Learned,
    Losses,
    Objective,
    SelectBy,
    Stage,
    Strategy,
    check_number,
    check_split,
)
from ckptavg.score import Split


@dataclass(frozen=True, kw_only=True)
class SeWA(Strategy):
    """Select K checkpoints with a mask learned by Gumbel-Softmax, and average them.

    The mask m ∈ {0,1}^N, Σ m_i = K, should minimise F(m) = E_B ℓ(Σ_i m_i w_i / Σ_i m_i; B). It is relaxed to
    m_i ~ Bernoulli(s_i), s ∈ C = {0 ≤ s_i ≤ 1, Σ s_i ≤ K}, from s_i = K/N. Each step draws M binary Concrete samples
    m̃_i = σ((log(s_i/(1−s_i)) + g1 − g0)/τ), g0, g1 ~ Gumbel(0,1), and takes s ← Π_C(s − η·∇_s mean ℓ(w(m̃))). The
    temperature τ falls linearly. The most probable masks of K, those with the largest Σ logit s_i (ties to the later),
    are scored, with every single candidate, the last K and the mean of all. Then up to ``--swaps`` subsets that differ
    in one candidate are scored: to first order, replacing i by j changes the loss by (∂F/∂c_j − ∂F/∂c_i)/K, so that one
    pass ranks all K(N−K) swaps. The best of all that was scored is returned, even if it is no mean of K, with a note.

    Differs from the paper in three ways. The gradient, less its mean, is divided by the root of the running mean of its
    squares, and η falls linearly to 0: loss differences between candidates vary by orders of magnitude between tasks,
    so no single η would suit all of them. The paper takes the K largest s_i without scoring or swaps (``--verify 1``);
    the relaxation is slightly inexact, and beyond 50 candidates far from the optimum. The paper fits the mask on
    training data (``--on train``); here validation data is the default, because a mask fitted on noisy training labels
    learns the noise. The authors' public code differs further: one Gumbel instead of two, straight-through always,
    τ = 1, AdamW on logits, no projection.

    References:
        Wang et al. 2025, SeWA: Selective Weight Average via Probabilistic Masking, arXiv:2502.10119. The estimator:
        Maddison, Mnih and Teh 2017, The Concrete Distribution, arXiv:1611.00712, equation 9. Constraint and
        projection: Zhou et al. 2021, ProbMask, CVPR.
    """

    k: Annotated[int | Literal["auto"], "Checkpoints to average; auto if quadratic."] = 5
    solver: Annotated[Literal["gumbel", "quadratic"], "Gradient steps or a quadratic model."] = "gumbel"
    hessian: Annotated[Hessian, "Second derivatives to use.", "quadratic solver"] = "auto"
    verify: Annotated[int, "How many of the best subsets to score; 1: none.", "both solvers"] = 8
    swaps: Annotated[int, "Most scores of swaps of one candidate.", "gumbel solver"] = 100
    select_by: Annotated[SelectBy, "What chooses: auto is the loss if the metric agrees.", "both solvers"] = "auto"
    steps: Annotated[int | None, "Steps of the mask; default 1 per candidate, at least 100.", "gumbel solver"] = None
    lr: Annotated[float, "Learning rate η ≈ size of the first steps.", "gumbel solver", "search by scores"] = 0.05
    samples: Annotated[int, "Monte Carlo samples M per step.", "gumbel solver"] = 2
    tau_start: Annotated[float, "Temperature at the first step.", "gumbel solver"] = 1.0
    tau_end: Annotated[float, "Temperature at the last step.", "gumbel solver"] = 0.3
    on: Annotated[Literal["val", "train"] | None, "Data to learn the mask on; default val, if any.", "both solvers"] = (
        None
    )
    straight_through: Annotated[bool, "Round the sampled mask to 0 or 1 in the forward pass.", "gumbel solver"] = False
    evaluations: Annotated[int, "Scores to spend with --score-cmd or --lm-eval.", "search by scores"] = 100

    def __post_init__(self) -> None:
        if self.k == "auto" and self.solver != "quadratic":
            raise UsageError("--k auto needs --solver quadratic, which solves for every K at once")
        for name in ("k", "steps", "samples", "evaluations", "verify"):
            if getattr(self, name) not in ("auto", None) and getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.verify == 1 and self.solver == "gumbel":
            if self.select_by != "auto":
                raise UsageError(f"--select-by {self.select_by} chooses among scored masks, and --verify 1 scores none")
            if self.swaps not in (0, SeWA.swaps):
                raise UsageError(f"--swaps {self.swaps} scores masks, and --verify 1 scores none")
        if self.swaps < 0:
            raise UsageError(f"--swaps must be at least 0, not {self.swaps}")
        for name in ("lr", "tau_start", "tau_end"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} must be greater than 0, not {getattr(self, name)}")

    def check(self, n: int, splits: Collection[Split], *, bounded: bool) -> None:
        """See `Strategy.check`."""
        check_number(self.k, n)
        check_split(self.on, splits)
        if self.solver == "quadratic" and not splits:
            raise UsageError("the quadratic solver needs a loss, not scores alone", hint="choose --solver gumbel")

    def stages(self, n: int, losses: Losses | None, scored_on: Split) -> Sequence[Stage]:
        """See `Strategy.stages`."""
        if losses is None:
            return (Stage("searching by scores", scores=self.evaluations),)
        if self.solver == "quadratic":
            from ckptavg.objective import curvature_stages
            from ckptavg.strategies.solvers.subset_descent import MOVES, VERIFYING

            auto = self.k == "auto"
            verify = min(self.verify, math.comb(n, n // 2 if self.k == "auto" else min(self.k, n)))
            verifying = Stage(VERIFYING, scores=verify + 2, singles=True)
            moves = min(2 * MOVES, MOVES * auto + verify - 1)
            return curvature_stages(n, losses.batches(self.on or scored_on), verifying, 1 + moves)
        from ckptavg.strategies.solvers.concrete_mask import LEARNING, VERIFYING
        from ckptavg.strategies.solvers.swaps import STAGE, gradients

        count = (self.steps or default_steps(n)) * self.samples
        learning = Stage(LEARNING, forward=count, backward=count)
        if self.verify == 1:
            return (learning,)
        k = min(int(self.k), n)
        subsets, passes = math.comb(n, k), losses.batches(scored_on)
        swaps = min(self.swaps, subsets)
        steps = passes * min(gradients(self.swaps), subsets)
        return (
            learning, Stage(VERIFYING, scores=min(self.verify, subsets) + 2), SCORED_ALONE,
            Stage(STAGE, scores=swaps, forward=steps, backward=steps),
        )  # fmt: skip

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        from ckptavg.strategies.solvers import score_search, subset_descent
        from ckptavg.strategies.solvers.concrete_mask import choose, learn_mask, likeliest

        losses = objective.losses
        if self.solver == "quadratic":
            assert losses is not None  # see `check`
            return subset_descent.descend(
                objective, losses, self.k, on=self.on, hessian=self.hessian, verify=self.verify,
                select_by=self.select_by,
            )  # fmt: skip
        assert self.k != "auto"
        if losses is None:
            return score_search.reinforce(objective, self.k, lr=self.lr, evaluations=self.evaluations)
        s_N, trace = learn_mask(
            objective, losses, self.k, on=self.on, steps=self.steps or default_steps(objective.n), lr=self.lr,
            samples=self.samples, tau=(self.tau_start, self.tau_end), straight_through=self.straight_through,
        )  # fmt: skip
        masks = [Coefficients.uniform(mask, objective.n) for mask in likeliest(s_N, self.k, self.verify)]
        best, notes = masks[0], list[str]()
        if self.verify > 1:
            best, notes = choose(objective, losses, masks, self.k, swaps=self.swaps, select_by=self.select_by)
        return Learned(coefficients=best, notes=notes, columns={"s": s_N.tolist()}, trace=trace)


def default_steps(n: int) -> int:
    """Return the default number of steps for ``n`` candidates; with swaps, more find nothing better up to 300."""
    return max(100, n)


STRATEGY: type[Strategy] = SeWA
