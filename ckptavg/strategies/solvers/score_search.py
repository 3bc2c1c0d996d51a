"""Search by scores alone, for objectives without a gradient: REINFORCE over subsets, CMA-ES over coefficients.

Shape suffixes: N = candidates, M = masks of a step.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import Learned, Objective
from ckptavg.objective.selection import Selection
from ckptavg.strategies.solvers.concrete_mask import EDGE, likeliest, project_capped_simplex
from ckptavg.strategies.solvers.subspace import Constraint, Subspace
from ckptavg.strategies.solvers.swaps import SwapSearch, answer, is_subset

STAGE = "searching by scores"
DRAWS = 8  # masks scored per step of s


def reinforce(objective: Objective, k: int, *, lr: float, evaluations: int) -> Learned:
    """Learn a mask by score-function gradients, and improve it by swaps, with ``evaluations`` scores.

    LAWA of the last K and the mean of all are scored first, and each single candidate if that takes at most an eighth
    of the budget. Each step then draws `DRAWS` masks m of exactly K candidates (the K largest of logit s_i + Gumbel
    noise) and takes s ← Π_C(s + η·Σ_m A(m)·(m − s)), A(m) being the scores less their mean, the sum brought to a mean
    square of 1: REINFORCE with the direction s(1−s)∇_s log p(m|s) = m − s, which stays bounded at 0 and 1. The last
    eighth of the budget is for the likeliest mask and swaps by s. The result is the best of all that was scored.

    References:
        Williams 1992, Simple Statistical Gradient-Following Algorithms, Machine Learning 8.
    """
    n, subsets = objective.n, math.comb(objective.n, k)
    s_N = torch.full((n,), k / n, dtype=torch.float64)
    selection = Selection(objective)
    trace: list[float] = []

    def drawn() -> Coefficients:
        noise_N = torch.rand(n, generator=objective.generator, dtype=torch.float64).log().neg().log().neg()
        return Coefficients.uniform((torch.logit(s_N, eps=EDGE) + noise_N).topk(k).indices.tolist(), n)

    def score(mixtures: Iterable[Coefficients]) -> None:
        room = evaluations - len(selection.scores)
        selection.score([m for m in dict.fromkeys(mixtures) if m not in selection.scores][:room], STAGE, evaluations)
        trace.append(max(score.value for score in selection.scores.values()))

    score([Coefficients.uniform(range(n - k, n), n), selection.plain[-1]])
    if 8 * n <= evaluations:
        score(selection.plain[:-1])
    steps = evaluations  # the same masks may be drawn again and again
    while 8 * len(selection.scores) < 7 * evaluations and _subsets(selection, k) < subsets and steps > 0:
        steps -= 1
        masks = [drawn() for _ in range(min(DRAWS, evaluations - len(selection.scores)))]
        score(masks)
        scores = torch.tensor([selection.scores[m].value for m in masks], dtype=torch.float64)
        m_MN = (torch.tensor([m.values[0] for m in masks], dtype=torch.float64) > 0).double()
        if (finite := scores[scores.isfinite()]).numel():
            scores = scores.clamp(min=finite.min())  # −∞ would make every difference infinite
        else:
            scores = torch.zeros_like(scores)
        ascent_N = (scores - scores.mean()) @ (m_MN - s_N)
        root = ascent_N.square().mean().sqrt().clamp(min=torch.finfo(scores.dtype).tiny)
        s_N = project_capped_simplex(s_N + lr * ascent_N / root, k)
    score(Coefficients.uniform(mask, n) for mask in likeliest(s_N, k, 1))
    search = SwapSearch(selection, lambda _: s_N.tolist(), evaluations - len(selection.scores), STAGE)
    search.descend(max((m for m in selection.scores if is_subset(m, k)), key=selection.ranking()))
    trace.append(max(score.value for score in selection.scores.values()))
    best, notes = answer(selection, k)
    return Learned(coefficients=best, notes=notes, columns={"s": s_N.tolist()}, trace={"best_score": trace})


def _subsets(selection: Selection, k: int) -> int:
    return sum(is_subset(mixture, k) for mixture in selection.scores)


def cma_es(objective: Objective, *, constraint: Constraint, evaluations: int) -> Learned:
    """Return the best of ``evaluations`` scored coefficients of CMA-ES on x in units of the distances.

    The search starts at the mean of all, x = 0, with steps of 1/N. Each single candidate is scored first, if that takes
    at most an eighth of the budget.

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
    subspace = Subspace(torch.ones(1, n, dtype=torch.float64), constraint)
    best, best_value = Coefficients.uniform(range(n), n), -math.inf
    trace: list[float] = []

    def at(x: Sequence[float]) -> Coefficients:
        return subspace.mixture(torch.tensor(x, dtype=torch.float64)[None])

    def cost(coefficients: Coefficients) -> float:
        nonlocal best, best_value
        value = objective.score(coefficients).value
        if value > best_value:
            best, best_value = coefficients, value
        trace.append(best_value)
        objective.progress(STAGE, len(trace), evaluations, score=best_value)
        return -value

    singles = Coefficients.singles(n) if n > 1 and 8 * n <= evaluations else []
    objective.prefetch([best, *singles])
    for plain in (best, *singles):
        cost(plain)
    normal = np.random.default_rng(seed).standard_normal  # by default cma seeds numpy's global generator
    options = {"randn": lambda *shape: normal(shape), "seed": math.nan, "verbose": -9, "verb_log": 0}
    search: Any = cma.CMAEvolutionStrategy(n * [0.0], 1 / n, options)
    while n > 1 and len(trace) < evaluations and not search.stop():
        proposals = search.ask(min(search.popsize, evaluations - len(trace)))
        mixtures = [at(x) for x in proposals]
        objective.prefetch(mixtures)
        costs = [cost(mixture) for mixture in mixtures]
        if len(costs) == search.popsize:
            search.tell(proposals, costs)
    plain = {Coefficients.uniform(range(n), n): "the mean of all candidates"} | dict.fromkeys(
        singles, "a single candidate"
    )
    notes = [f"no scored mixture was better than {plain[best]}, which is the answer"] if best in plain and n > 1 else []
    return Learned(coefficients=best, trace={"best_score": trace}, notes=notes)
