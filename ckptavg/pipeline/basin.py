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
import math
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, median_high, median_low
from tempfile import TemporaryFile, gettempdir
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.declaration import CANDIDATES, declared
from ckptavg.errors import decimal
from ckptavg.objective import Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.objective.mixture import Mixture
from ckptavg.options import NOT_INSPECT, Options
from ckptavg.pipeline.basin_verdict import EXPLODED, aside, verdict
from ckptavg.pipeline.exact_adapter import given
from ckptavg.pipeline.session import Session, open_session
from ckptavg.report.basin import BasinCandidate, Basins, Midpoint
from ckptavg.report.digits import figure_places
from ckptavg.report.interval import FEWEST, single_gain
from ckptavg.report.result import Gain
from ckptavg.runtime.estimate import Stage
from ckptavg.runtime.progress import Watch
from ckptavg.score import Score, valid
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
    aside, and those worse than the median of all by more than 100 times its size and the median distance to it. A
    midpoint of neighbours, or of two runs, may be worse than the better end alone without a barrier: `Midpoint.harms`.

    Raises:
        CkptavgError: on any expected failure.
    """
    # the same command finds its measurements in this journal, another one has its own
    name = f"basin-{hashlib.sha256(repr((Path.cwd(), paths, options)).encode()).hexdigest()[:8]}"
    output = options.workers.broadcast(options.workers.on_rank_zero(_writable_folder) or Path()) / name
    with open_session(paths, replace(options, output=output, force=True), watch, mixed=True) as this:
        evaluator = this.scored("--basin scores midpoints, so it needs a task file, --val or --score-cmd")
        evaluator.prepare()
        result = _measured(this, evaluator)
        this.finish(output)
        return result


def _writable_folder() -> Path:
    """Return the working directory if it can be written, else the directory for temporary files."""
    try:
        with TemporaryFile(dir=Path()):
            return Path()
    except OSError:
        return Path(gettempdir())


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
    kept, of = _sane(singles), [checkpoint.run + 1 for checkpoint in this.checkpoints]
    runs = [[i for i in kept if of[i] == run] for run in sorted({of[i] for i in kept})]
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
        self._neighbours = neighbours
        self._usual = median([abs(singles[i].value - singles[j].value) for i, j in neighbours] or [0.0])

    def separates(self, i: int, j: int) -> bool:
        """Return whether a barrier separates two candidates."""
        if (i, j) not in self.known:
            score = self._find(Coefficients.uniform((i, j), len(self._singles)))
            steps = (self._checkpoints[i].step, self._checkpoints[j].step)
            ends = self._singles[i], self._singles[j]
            barrier, threshold, separates, harms = None, None, True, False
            if not score.invalid:
                barrier, threshold, separates = _worse(score, _mean(ends), self._usual)
                near = not separates and (i, j) in self._neighbours  # the first of a run may be far worse than its last
                usual = self._usual / _USUAL if len(self._neighbours) > 1 else 0.0  # of two it is their own difference
                harms = near and _worse(score, max(ends, key=lambda end: end.value), usual)[2]
            self.known[i, j] = Midpoint(
                candidates=(i, j), steps=steps, score=score, barrier=barrier, threshold=threshold,
                separates=separates, harms=harms,
            )  # fmt: skip
        return self.known[i, j].separates


def _sane(singles: Sequence[Score]) -> list[int]:
    """Return the candidates that are not set aside; of two, the better one is the median."""
    values = [score.value for score in singles if not score.invalid]
    middle = median_high(values or [0.0])
    spread = median_low(abs(value - middle) for value in values or [0.0])
    lowest = middle - EXPLODED * max(abs(middle), spread)
    return [i for i, score in enumerate(singles) if not score.invalid and score.value >= lowest]


def _worse(mixture: Score, reference: Score, usual: float) -> tuple[Gain, float, bool]:
    """Return how much worse a mixture scores than ``reference``, the height that matters, and whether it is exceeded.

    Args:
        usual: the median difference of neighbours, of which a height without an interval must be several times.
    """
    height = single_gain(reference, mixture)
    lowest, usual = (height.value, usual) if height.low is None else (height.low, 0.0)
    threshold = max(TOLERANCE * abs(reference.value), _USUAL * usual)
    return height, threshold, lowest > threshold


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


def _mean(scores: Sequence[Score]) -> Score:
    """Return the mean of scores, by example if all saw the same ones in the same order."""
    units, per_example = [score.per_example for score in scores if score.per_example is not None], None
    if len(units) == len(scores) and len({(each.order, len(each.values_U)) for each in units}) == 1:
        values_U = sum((each.values_U for each in units[1:]), start=units[0].values_U) / len(units)
        per_example = replace(units[0], values_U=values_U)
    value = fmean(score.value for score in scores)
    return Score(value=value, loss=None, metric=None, examples=scores[0].examples, per_example=per_example)


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
    """Return a warning if candidates have exploded, or their mean is worse than they are on average; else "".

    In one basin its loss is at most the mean of their losses (Jensen's inequality). Nothing is scored for this.

    Args:
        strategies: those that have run; without `Best` or `GreedySoup` the single candidates have no scores.
        mixtures: the mixtures that they chose, which are scored.
    """
    mean = Coefficients.uniform(range(evaluator.n), evaluator.n)
    if mean not in mixtures or not any(isinstance(strategy, Best | GreedySoup) for strategy in strategies):
        return ""
    singles = [evaluator.score(single) for single in Coefficients.singles(evaluator.n)]
    scored = evaluator.exact_score(mean, evaluator.scored_on)
    return mean_note(singles, scored, this.checkpoints, this.paths, this.options)


def mean_note(
    singles: Sequence[Score], mean: Score, checkpoints: Sequence[Checkpoint], paths: Sequence[Path], options: Options
) -> str:
    """Return the warning of `basin_note` for the scores of the candidates and of their mean.

    The rule is that of `find_basins`. Where a metric has the values per example, the losses have no interval, and their
    threshold is that with an interval if they are means of enough examples for one.
    """
    by_loss = all(score.loss is not None for score in (*singles, mean))
    *alone, whole = [_by_loss(score) if by_loss else score for score in (*singles, mean)]
    figures = [score.loss if by_loss else score.metric for score in (*singles, mean)]
    name, figure = "loss" if by_loss else mean.name, figures[-1] or 0.0
    shown = partial(decimal, places=figure_places([*singles, mean], name))
    kept = _sane(alone)
    if len(kept) < len(alone):
        words = " ".join(aside(alone, kept, checkpoints, options))
        return f"{words} The mean of all {len(alone)} candidates has {name} {shown(figure)}" if kept else words
    paired = by_loss and mean.metric is not None and all(_has_interval(score) for score in singles)
    usual = 0.0 if paired else median([abs(a.value - b.value) for a, b in pairwise(alone)] or [0.0])
    if whole.invalid or not _worse(whole, _mean(alone), usual)[2]:
        return ""
    others = [option.name for option in declared(Options) if option.help.panel != CANDIDATES and option.name != "last"]
    chosen = given(options, (*others, *NOT_INSPECT))
    command = shlex.join(["ckptavg", "inspect", *map(str, paths), "--basin", *chosen])
    return (
        f"the mean of all {len(singles)} candidates has {name} {shown(figure)}, worse than theirs, "
        f"{shown(fmean(each or 0.0 for each in figures[:-1]))} on average: some do not average with others. "
        f"`{command}` on this task looks for the barrier"
    )


def _by_loss(score: Score) -> Score:
    assert score.loss is not None
    per_example = score.per_example if score.metric is None else None
    return replace(score, value=-score.loss, metric=None, per_example=per_example, resampled=None)


def _has_interval(score: Score) -> bool:
    """Return whether the loss is a mean of enough examples, or batches, for an interval."""
    units = score.per_example
    return units is not None and len(units.values_U) >= FEWEST and math.isfinite(score.loss_noise)
