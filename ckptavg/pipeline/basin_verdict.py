"""Sentences on basins: where the barriers are, and the options that keep the candidates of one basin."""

import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint, shortest_names
from ckptavg.checkpoints.window import Window
from ckptavg.errors import counted, decimal
from ckptavg.report.basin import BasinCandidate, Midpoint
from ckptavg.report.digits import figure_texts
from ckptavg.score import Score

EXPLODED: Final = 100  # times worse than the median, beyond which a candidate is set aside
_NAMED: Final = 3  # barriers, or candidates without a score


def verdict(
    candidates: Sequence[BasinCandidate], midpoints: Sequence[Midpoint], checkpoints: Sequence[Checkpoint],
    paths: Sequence[Path], window: Window,
) -> str:  # fmt: skip
    """Return where the barriers are, and how to keep the candidates of one basin.

    Args:
        checkpoints: the files of the candidates.
        paths: the directories or checkpoints that were given.
        window: the options that selected the candidates.
    """
    kept = [i for i, one in enumerate(candidates) if one.basin is not None]
    sentences = aside([one.score for one in candidates], kept, checkpoints, window)
    scored = [one for one in candidates if one.basin is not None]
    basins = {one.basin for one in scored}
    coarse = [(m.threshold or 0.0, m.barrier.reason) for m in midpoints if m.barrier and m.barrier.low is None]
    if len(basins) > 1:
        given = _given(candidates, paths)
        places = list(_barriers(candidates, midpoints, given))
        more = f", and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        shown = ", ".join(places[:_NAMED])
        sentences.append(f"{len(basins)} basins: candidates on two sides of a barrier do not average: {shown}{more}.")
        sentences.append(_way_out(scored, given, window))
    elif len(scored) == 1:
        sentences.append("One candidate: there is nothing to average.")
    elif coarse:
        sentences.append(f"No barrier found between the {len(scored)} candidates.")
    else:
        sentences.append(f"One basin: no barrier separates the {len(scored)} candidates.")
    sentences += _harm(candidates, midpoints, checkpoints)
    if coarse:
        height, reason = max(coarse)
        size = ", three times the difference of the two," if len(scored) == 2 else ""
        sentences.append(f"Without an interval ({reason}) only barriers above {decimal(height)}{size} are seen.")
    return " ".join(sentences)


def aside(
    singles: Sequence[Score], kept: Collection[int], checkpoints: Sequence[Checkpoint], window: Window
) -> list[str]:  # fmt: skip
    """Return sentences on the candidates that are set aside, all but ``kept``, and how to leave them out."""
    names = shortest_names([file.path for file in checkpoints])
    others = [i for i in range(len(singles)) if i not in kept]
    alone = len(others) == 1 and window.exclude is None  # --exclude takes one glob
    sentences: list[str] = []
    worse = f"exploded (over {EXPLODED} times worse than the median)"
    for invalid, state in ((True, "no finite score"), (False, worse)):
        if which := [i for i in others if bool(singles[i].invalid) == invalid]:
            more = f" and {len(which) - _NAMED} more" if len(which) > _NAMED else ""
            number = f"{counted(len(which), 'candidate')} {'have' if len(which) > 1 else 'has'}"
            listed = ", ".join(names[i] for i in which[:_NAMED])
            ways = f"leave out with {checkpoints[which[0]].excluding}" if alone else f"{listed}{more}"
            sentences.append(f"{number} {state}: {ways}.")
    return [*sentences, "Give only the files of the others."] if others and not alone else sentences


def _harm(
    candidates: Sequence[BasinCandidate], midpoints: Sequence[Midpoint], checkpoints: Sequence[Checkpoint]
) -> list[str]:  # fmt: skip
    """Return a warning if midpoints are worse than the better end alone, with the one that loses most."""
    harmful = [midpoint for midpoint in midpoints if midpoint.harms]
    if not harmful:
        return []
    names, scores = shortest_names([file.path for file in checkpoints]), [one.score for one in candidates]

    def loss(midpoint: Midpoint) -> float:
        return max(scores[i].value for i in midpoint.candidates) - midpoint.score.value

    worst = max(harmful, key=loss)
    worse, better = sorted(worst.candidates, key=lambda i: scores[i].value)
    name = next(iter(worst.score.figures))
    figure, alone = figure_texts([worst.score, scores[better]], name)
    return [
        f"But averaging can do harm: the midpoint of {names[worse]} and {names[better]} has {name} {figure}, "
        f"{names[better]} alone {alone}. `ckptavg soup` leaves out candidates that make the average worse."
    ]


def _given(candidates: Sequence[BasinCandidate], paths: Sequence[Path]) -> dict[int, list[Path]]:
    """Return the given paths by run: its directory, or checkpoints of it."""
    by_run: dict[int, list[Path]] = {}
    for one in candidates:
        own = by_run.setdefault(one.run, [])
        above = (path for path in paths if path == one.path or path in one.path.parents)
        path = max(above, key=lambda path: len(path.parts), default=one.path.parent)
        own += [] if path in own else [path]
    return by_run


def _barriers(
    candidates: Sequence[BasinCandidate], midpoints: Sequence[Midpoint], given: Mapping[int, Sequence[Path]]
) -> Iterator[str]:
    """Yield the places of the barriers, within the runs and between them: ends of midpoints that separate."""
    scored = [one for one in candidates if one.basin is not None]
    walls = [tuple(candidates[i] for i in midpoint.candidates) for midpoint in midpoints if midpoint.separates]
    runs = sorted({one.run for one in scored})
    names = {run: own[0] if len(own) == 1 else own[0].parent for run, own in given.items()}
    for run in runs:
        of = f" of {names[run]}" if len(runs) > 1 else ""
        for before, after in pairwise(one for one in scored if one.run == run):
            if before.basin != after.basin:
                end = next(b for a, b in walls if a is before and b.basin == after.basin)
                shown = "" if end is after else f" (by the midpoint of {before.step} and {end.step})"
                yield f"between steps {before.step} and {after.step}{of}{shown}"
    for before, after in sorted({(a.run, b.run) for a, b in walls if a.run != b.run}):
        yield f"between the last candidates of {names[before]} and {names[after]}"


def _way_out(scored: Sequence[BasinCandidate], given: Mapping[int, Sequence[Path]], window: Window) -> str:
    """Return the options that keep the most candidates of one basin, of equally many those with the best one."""
    sizes = Counter(one.basin for one in scored)
    (largest, size), *_ = sizes.most_common()
    if size == 1:
        return "No two candidates share a basin, so average none: `ckptavg best` takes one."
    possible: list[tuple[list[BasinCandidate], list[BasinCandidate]]] = []
    for basin in sizes:
        own = sorted({one.run for one in scored if one.basin == basin})
        for runs in (own, *([run] for run in own)):
            around = [one for one in scored if one.run in runs]
            kept = [one for one in around if one.basin == basin]
            first, last = min(one.step for one in kept), max(one.step for one in kept)
            if len(kept) > 1 and [one for one in around if first <= one.step <= last] == kept:
                possible.append((kept, around))
    if not possible:
        return f"Give only the files of one basin, such as {largest}."
    kept, around = max(possible, key=lambda way: (len(way[0]), max(one.score.value for one in way[0])))
    runs = sorted({one.run for one in kept})
    first, last = min(one.step for one in kept), max(one.step for one in kept)
    ways = (
        [f"{' '.join(shlex.quote(str(path)) for run in runs for path in given[run])} alone"]
        if len(around) < len(scored)
        else []
    )
    options = [f"--start {first}"] if window.last is not None or any(one.step < first for one in around) else []
    options += [f"--stop {last}"] if any(one.step > last for one in around) else []
    ways += [" ".join(options)] if options else []
    best = max(kept, key=lambda one: one.score.value)
    name = next(iter(best.score.figures))
    figure = figure_texts([best.score], name)[0]
    number = counted(len(kept), "candidate")
    return f"{' with '.join(ways)} keeps one basin: {number}, with {name} {figure} at best (step {best.step})."
