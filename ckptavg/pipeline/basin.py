"""Basins: which candidates average, by the scores of midpoints between them.

The midpoint of two candidates in one basin is at most as bad as the mean of the two, since the loss is nearly convex
there. Where it is worse, a barrier separates them: they lie in basins that a restart of the learning rate, a spike or
another seed has led to. A midpoint bounds the height of the barrier along the line from below.

References:
    Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv:1912.05671: the barrier above
    the mean of the ends, and 2 % as its threshold; Garipov et al. 2018, arXiv:1802.10026, and Draxler et al. 2018,
    arXiv:1803.00885: curved paths around such barriers, which an average does not follow.
"""

import hashlib
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, median_high, median_low
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.declaration import CANDIDATES, declared
from ckptavg.errors import decimal
from ckptavg.objective import Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.objective.mixture import Mixture
from ckptavg.options import NOT_INSPECT, Options
from ckptavg.pipeline.basin_verdict import EXPLODED, verdict
from ckptavg.pipeline.exact_adapter import given
from ckptavg.pipeline.session import Session, open_session
from ckptavg.report.basin import BasinCandidate, Basins, Midpoint
from ckptavg.report.interval import single_gain
from ckptavg.runtime.estimate import Stage
from ckptavg.runtime.progress import Watch
from ckptavg.score import PerExample, Score, valid
from ckptavg.strategies.best import Best
from ckptavg.strategies.soup import GreedySoup

TOLERANCE: Final = 0.02  # of the mean of the two ends
_USUAL: Final = 3  # usual differences of neighbours that a barrier without an interval must exceed
_SINGLES: Final = "scoring candidates"
_MIDPOINTS: Final = "scoring midpoints"


def find_basins(paths: Sequence[Path], options: Options, watch: Watch | None = None) -> Basins:
    """Score the candidates under ``paths`` and midpoints between them, and divide them into basins.

    In each run, in training order, these are the midpoints of neighbours and, where no barrier separates these, that of
    the first and the last: if a barrier does, bisection finds the first that averages with the last. Of several runs,
    the last candidates are compared, best first: each with the best one of each basin found so far, which it joins if
    no barrier is between. A run of one basin takes 2N passes.

    A midpoint separates its ends if the 95 % interval of the barrier, paired by example, lies above 2 % of their mean.
    Without an interval, the barrier must be larger than this, and than three times the median difference of neighbours.
    It is measured by the loss alone, or by the score where there is no loss. Candidates without a finite score are set
    aside, and those worse than the median of all by more than 100 times its size and the median distance to it.

    Raises:
        CkptavgError: on any expected failure.
    """
    # the same command finds its measurements in this journal, another one has its own
    output = Path(f"basin-{hashlib.sha256(repr((paths, options)).encode()).hexdigest()[:8]}")
    with open_session(paths, replace(options, output=output, force=True), watch, mixed=True) as this:
        evaluator = this.scored("--basin scores midpoints, so it needs a task file, --val or --score-cmd")
        evaluator.prepare()
        result = _measured(this, evaluator)
        this.finish(output)
        return result


def _measured(this: Session, evaluator: Evaluator) -> Basins:
    n, split, progress = evaluator.n, evaluator.scored_on, this.run.progress
    prefetch, find, batches = evaluator.prefetch, evaluator.exact_score, evaluator.score_batches
    if isinstance(evaluator, Mixture) and evaluator.losses is not None:
        scoring = evaluator.sampled(sys.maxsize)  # the loss alone, on all data
        prefetch, find, batches = scoring.prefetch, partial(scoring.find, exact=True), scoring.forward_batches
    alone = Coefficients.singles(n)

    def plan() -> Sequence[Stage] | None:
        forward, counts = batches(split), {_SINGLES: n, _MIDPOINTS: n - 1}  # without those of a bisection
        return None if forward is None else [Stage(name, forward=count * forward) for name, count in counts.items()]

    progress.expect(plan, "forward" if evaluator.losses else "scores")
    prefetch(alone, split, exact=True)
    singles: list[Score] = []
    for single in alone:
        singles.append(find(single, split))
        progress(_SINGLES, len(singles), n)
    valid(max(singles, key=lambda score: score.value))  # raises if no candidate has a valid score
    lowest = _lowest_sane(singles)
    of = [checkpoint.run for checkpoint in this.checkpoints]
    of = [0] * n if len(set(of)) == n else of  # runs of one candidate each are one run
    runs = [[i for i, run in enumerate(of) if run == each and singles[i].value >= lowest] for each in sorted(set(of))]
    runs = [run for run in runs if run]
    ends = sorted((run[-1] for run in runs), key=lambda i: singles[i].value, reverse=True)
    pairs = [pair for run in runs for pair in pairwise(run)] + [_pair(ends[0], end) for end in ends[1:]]
    prefetch([Coefficients.uniform(pair, n) for pair in pairs], split, exact=True)
    midpoints = _Midpoints(this.checkpoints, singles, pairs, lambda mixture: find(mixture, split))
    for done, pair in enumerate(pairs, 1):
        midpoints.separates(*pair)
        progress(_MIDPOINTS, done, len(pairs))
    parts = [[part for stretch in _stretches(run, midpoints) for part in _divided(stretch, midpoints)] for run in runs]
    basins = _joined(parts, ends, midpoints)
    number = {i: number for number, basin in enumerate(basins, 1) for i in basin}
    candidates = [
        BasinCandidate(path=c.path, step=c.step, run=of[i], score=singles[i], basin=number.get(i))
        for i, c in enumerate(this.checkpoints)
    ]
    return Basins(
        name="loss" if singles[0].loss is not None else singles[0].name, scored_on=split, candidates=candidates,
        midpoints=[*midpoints.known.values()], notes=evaluator.notes,
        verdict=verdict(candidates, [*midpoints.known.values()], this.checkpoints, this.paths, this.options),
    )  # fmt: skip


class _Midpoints:
    """Midpoints by their ends, each scored when it is first needed.

    Args:
        checkpoints: the candidates.
        singles: their scores alone.
        neighbours: pairs of them whose scores usually differ by noise.
        find: scores a mixture.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], singles: Sequence[Score], neighbours: Sequence[tuple[int, int]],
        find: Callable[[Coefficients], Score],
    ) -> None:  # fmt: skip
        self.known: dict[tuple[int, int], Midpoint] = {}
        self._checkpoints = checkpoints
        self._singles = singles
        self._find = find
        self._usual = median([abs(singles[i].value - singles[j].value) for i, j in neighbours] or [0.0])

    def separates(self, i: int, j: int) -> bool:
        """Return whether a barrier separates two candidates."""
        if (i, j) not in self.known:
            score = self._find(Coefficients.uniform((i, j), len(self._singles)))
            steps = (self._checkpoints[i].step, self._checkpoints[j].step)
            ends = self._singles[i], self._singles[j]
            barrier, threshold, separates = None, None, True
            if not score.invalid:
                mean = _mean(*ends)
                barrier = single_gain(mean, score)
                lowest, usual = (barrier.value, self._usual) if barrier.low is None else (barrier.low, 0.0)
                threshold = _threshold(mean.value, usual)
                separates = lowest > threshold
            self.known[i, j] = Midpoint(
                candidates=(i, j), steps=steps, score=score, barrier=barrier, threshold=threshold, separates=separates
            )
        return self.known[i, j].separates


def _lowest_sane(singles: Sequence[Score]) -> float:
    """Return the lowest value that is not set aside; of two, the better one is the median."""
    values = [score.value for score in singles if not score.invalid]
    middle = median_high(values)
    return middle - EXPLODED * max(abs(middle), median_low(abs(value - middle) for value in values))


def _joined(
    parts: Sequence[Sequence[Sequence[int]]], ends: Sequence[int], midpoints: _Midpoints
) -> list[list[int]]:  # fmt: skip
    """Return the basins: the parts of each run, the last ones joined if no barrier is between their ends."""
    last = {run[-1][-1]: run[-1] for run in parts}
    joined: dict[int, list[int]] = {}
    for end in ends:
        first = next((first for first in joined if not midpoints.separates(*_pair(first, end))), end)
        joined.setdefault(first, []).extend(last[end])
    return sorted(map(sorted, [*(part for run in parts for part in run[:-1]), *joined.values()]))


def _pair(i: int, j: int) -> tuple[int, int]:
    return (i, j) if i < j else (j, i)


def _mean(first: Score, second: Score) -> Score:
    """Return the mean of two scores, by example if both saw the same ones in the same order."""
    a, b, per_example = first.per_example, second.per_example, None
    if a is not None and b is not None and a.order == b.order and len(a.values_U) == len(b.values_U):
        values_U = (a.values_U + b.values_U) / 2
        per_example = PerExample(values_U=values_U, examples_U=a.examples_U, order=a.order)
    value = (first.value + second.value) / 2
    return Score(value=value, loss=None, metric=None, examples=first.examples, per_example=per_example)


def _threshold(mean: float, usual: float) -> float:
    return max(TOLERANCE * abs(mean), _USUAL * usual)


def _stretches(run: Sequence[int], midpoints: _Midpoints) -> list[list[int]]:
    """Divide a run where a barrier separates neighbours."""
    stretches = [[run[0]]]
    for i, j in pairwise(run):
        if midpoints.separates(i, j):
            stretches.append([])
        stretches[-1].append(j)
    return stretches


def _divided(stretch: list[int], midpoints: _Midpoints) -> list[list[int]]:
    """Divide a stretch without barriers between neighbours where one separates candidates from its last."""
    parts: list[list[int]] = []
    while len(stretch) > 2 and midpoints.separates(stretch[0], stretch[-1]):
        far, near = 0, len(stretch) - 2  # the last averages with `near`, but not with `far`
        while near - far > 1:
            middle = (near + far) // 2
            far, near = (middle, near) if midpoints.separates(stretch[middle], stretch[-1]) else (far, middle)
        parts, stretch = [stretch[near:], *parts], stretch[:near]
    return [stretch, *parts]


def basin_note(
    evaluator: Evaluator, strategies: Collection[Strategy], mixtures: Collection[Coefficients], this: Session
) -> str:
    """Return a warning if the mean of all candidates is worse than these are on average, more than noise; else "".

    In one basin its loss is at most the mean of their losses (Jensen's inequality). Nothing is scored for this.

    Args:
        strategies: those that have run; without `Best` or `GreedySoup` the single candidates have no scores.
        mixtures: the mixtures that they chose, which are scored.
    """
    mean = Coefficients.uniform(range(evaluator.n), evaluator.n)
    if mean not in mixtures or not any(isinstance(strategy, Best | GreedySoup) for strategy in strategies):
        return ""
    singles = [evaluator.score(single) for single in Coefficients.singles(evaluator.n)]
    return mean_note(singles, evaluator.exact_score(mean, evaluator.scored_on), this.paths, this.options)


def mean_note(singles: Sequence[Score], mean: Score, paths: Sequence[Path], options: Options) -> str:
    """Return the warning of `basin_note` for the scores of the candidates and of their mean."""
    scores = [*singles, mean]
    by_loss = all(score.loss is not None for score in scores)
    *values, value = [-(score.loss or 0.0) if by_loss else score.value for score in scores]
    usual = 0.0 if by_loss or len(values) < 2 else median(abs(a - b) for a, b in pairwise(values))
    if any(score.invalid for score in scores) or fmean(values) - value <= _threshold(fmean(values), usual):
        return ""
    name = "loss" if by_loss else mean.name
    *figures, figure = [score.loss if by_loss else score.metric for score in scores]
    alone = fmean(each or 0.0 for each in figures)
    others = [option.name for option in declared(Options) if option.help.panel != CANDIDATES and option.name != "last"]
    chosen = given(options, (*others, *NOT_INSPECT))
    command = shlex.join(["ckptavg", "inspect", *map(str, paths), "--basin", *chosen])
    return (
        f"the mean of all {len(singles)} candidates has {name} {decimal(figure)}, worse than theirs, {decimal(alone)} "
        f"on average: some do not average with others. `{command}` on this task looks for the barrier"
    )
