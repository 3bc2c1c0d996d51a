"""Search by scores alone, for objectives without a gradient: REINFORCE over subsets, CMA-ES over coefficients.

Shape suffixes: N = candidates, M = masks of a step.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import Learned, Objective
from ckptavg.strategies.solvers.concrete_mask import EDGE, likeliest, project_capped_simplex
from ckptavg.strategies.solvers.subspace import Subspace

DRAWS = 8  # masks scored per step of s


def reinforce(objective: Objective, k: int, *, lr: float, evaluations: int) -> Learned:
    """Learn a mask by score-function gradients from ``evaluations`` scores of K candidates each.

    Each step draws `DRAWS` masks m of exactly K candidates (the K largest of logit s_i + Gumbel noise) and takes
    s ← Π_C(s + η·Σ_m A(m)·(m − s)), A(m) being the scores less their mean, the sum brought to a mean square of 1:
    REINFORCE with the direction s(1−s)∇_s log p(m|s) = m − s, which stays bounded at 0 and 1. The result is the best
    of all scored masks; the most probable mask is scored last.

    References:
        Williams 1992, Simple Statistical Gradient-Following Algorithms, Machine Learning 8.
    """
    n = objective.n
    s_N = torch.full((n,), k / n, dtype=torch.float64)
    scored: dict[tuple[int, ...], float] = {}
    trace: list[float] = []

    def drawn() -> tuple[int, ...]:
        noise_N = torch.rand(n, generator=objective.generator, dtype=torch.float64).log().neg().log().neg()
        return tuple(sorted((torch.logit(s_N, eps=EDGE) + noise_N).topk(k).indices.tolist()))

    def score(mask: tuple[int, ...]) -> float:
        if mask not in scored:
            scored[mask] = objective.score(Coefficients.uniform(mask, n)).value
        return scored[mask]

    while len(scored) < min(evaluations, math.comb(n, k)) and len(trace) < evaluations:
        rest = evaluations - len(scored)
        masks = [drawn() for _ in range(min(DRAWS, rest - 1))] or likeliest(s_N, k, 1)
        objective.prefetch([Coefficients.uniform(mask, n) for mask in masks])
        scores = torch.tensor([score(mask) for mask in masks], dtype=torch.float64)
        m_MN = torch.zeros(len(masks), n, dtype=torch.float64).scatter_(1, torch.tensor(masks), 1)
        if (finite := scores[scores.isfinite()]).numel():
            scores = scores.clamp(min=finite.min())  # −∞ would make every difference infinite
        else:
            scores = torch.zeros_like(scores)
        ascent_N = (scores - scores.mean()) @ (m_MN - s_N)
        root = ascent_N.square().mean().sqrt().clamp(min=torch.finfo(scores.dtype).tiny)
        s_N = project_capped_simplex(s_N + lr * ascent_N / root, k)
        trace.append(max(scored.values()))
        objective.progress("searching by scores", len(scored), evaluations, score=trace[-1])
    score(likeliest(s_N, k, 1)[0])
    coefficients = Coefficients.uniform(max(scored, key=lambda mask: (scored[mask], mask)), n)
    return Learned(coefficients=coefficients, columns={"s": s_N.tolist()}, trace={"best_score": trace})


def cma_es(objective: Objective, *, simplex: bool, evaluations: int) -> Learned:
    """Return the best of ``evaluations`` scored coefficients of CMA-ES on x in units of the distances.

    The search starts at the mean of all, x = 0, with steps of 1/N.

    References:
        Hansen 2016, The CMA Evolution Strategy, a tutorial, arXiv:1604.00772, implemented by its author's library.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its import probes for matplotlib
            import cma
            import numpy as np
    except ImportError as error:
        raise UsageError("a search by scores needs the package cma", hint="pip install 'ckptavg[score]'") from error
    n = objective.n
    seed = int(torch.randint(1, 2**31, (1,), generator=objective.generator))
    subspace = Subspace(torch.ones(1, n, dtype=torch.float64), simplex=simplex)
    best, best_value = Coefficients.uniform(range(n), n), -math.inf
    trace: list[float] = []

    def at(x: Sequence[float]) -> Coefficients:
        return subspace.mixture(torch.tensor(x, dtype=torch.float64)[None])

    def cost(x: Sequence[float]) -> float:
        nonlocal best, best_value
        coefficients = at(x)
        value = objective.score(coefficients).value
        if value > best_value:
            best, best_value = coefficients, value
        trace.append(best_value)
        objective.progress("searching by scores", len(trace), evaluations, score=best_value)
        return -value

    cost([0.0] * n)
    normal = np.random.default_rng(seed).standard_normal  # by default cma seeds numpy's global generator
    options = {"randn": lambda *shape: normal(shape), "seed": math.nan, "verbose": -9, "verb_log": 0}
    search: Any = cma.CMAEvolutionStrategy(n * [0.0], 1 / n, options)
    while n > 1 and len(trace) < evaluations and not search.stop():
        proposals = search.ask(min(search.popsize, evaluations - len(trace)))
        objective.prefetch([at(x) for x in proposals])
        costs = [cost(x) for x in proposals]
        if len(costs) == search.popsize:
            search.tell(proposals, costs)
    return Learned(coefficients=best, trace={"best_score": trace})
