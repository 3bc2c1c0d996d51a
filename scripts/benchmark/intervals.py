"""Coverage of the 95 % intervals of a difference of two scores: python scripts/benchmark/intervals.py

Pairs of models whose true difference is known are drawn again and again. For each kind of data and number of units the
table has the share of draws in which `ckptavg.report.interval.gain` gives an interval, in percent; how often that
contains the true difference; and its median width. The other columns are coverages of other methods on the same draws,
those of which the bootstraps are tried on fewer. ``--summary`` counts the lines that each method covers to 92 to 98 %,
of those in which at least 5 % of the draws have an interval.

Shape suffixes: R = draws, U = units, B = resamples.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from interval_methods import FEW_DRAWS, METHODS, Array, Interval, other_intervals
from scipy import stats

from ckptavg.report.interval import gain
from ckptavg.score import PerExample, Score

OWN = "t, extended by Hall's"  # of ckptavg
RARE = 0.05  # share of draws with an interval below which its coverage is that of a selection


@dataclass(frozen=True)
class Draws:
    """Scores of R data sets by two models, with the true difference, and what the method must know of them."""

    a_RU: Array
    b_RU: Array
    truth: float
    examples_U: Array | None = None
    paired: bool = True
    metric: Callable[[Array, Array, Sequence[int]], float] | None = None  # of labels, predictions, chosen units
    labels_RU: Array | None = None


Case = Callable[[np.random.Generator, int, int], Draws]


def answers(p: float, q: float, overlap: float, rng: np.random.Generator, draws: int, units: int) -> Draws:
    """0 or 1, right with probability p and q; overlap 0 is independent, 1 the largest possible correlation."""
    both = (1 - overlap) * p * q + overlap * min(p, q)
    x_RU = rng.random((draws, units))
    return Draws((x_RU < p) * 1.0, ((x_RU < both) | ((x_RU >= p) & (x_RU < p + q - both))) * 1.0, p - q)


def unpaired(case: Case, rng: np.random.Generator, draws: int, units: int) -> Draws:
    """The two models on other examples each."""
    one, other = case(rng, draws, units), case(rng, draws, units)
    return Draws(one.a_RU, other.b_RU, one.truth, paired=False)


def losses(base: Callable[..., Array], mean: float, factor: float, rng: np.random.Generator, draws: int, units: int,
           *, independent: bool = False) -> Draws:  # fmt: skip
    """−loss of examples of varying difficulty; that of the second model is ``factor`` times as large on average."""
    shape = (draws, units)
    hard_RU = base(rng, shape)
    other_RU = base(rng, shape) if independent else hard_RU
    noise = (0 if independent else 1) * 0.3
    a_RU, b_RU = (x_RU * np.exp(noise * rng.standard_normal(shape) - noise**2 / 2) for x_RU in (hard_RU, other_RU))
    return Draws(-a_RU, -factor * b_RU, (factor - 1) * mean)


def differences(draw: Callable[..., Array], truth: float, rng: np.random.Generator, draws: int, units: int) -> Draws:
    d_RU = draw(rng, (draws, units))
    return Draws(d_RU, np.zeros_like(d_RU), truth)


def sized(case: Case, rng: np.random.Generator, draws: int, units: int) -> Draws:
    """Units of 1 to 32 examples that share a value."""
    given = case(rng, draws, units)
    return Draws(given.a_RU, given.b_RU, given.truth, rng.integers(1, 33, units).astype(float))


def batches(case: Case, size: int, rng: np.random.Generator, draws: int, units: int) -> Draws:
    """Means of batches, the last of which is a quarter as large."""
    given, last = case(rng, draws, units * size), size // 4
    examples_U = np.full(units, float(size))
    examples_U[-1] = last
    means = [x.reshape(draws, units, size).mean(axis=2) for x in (given.a_RU, given.b_RU)]
    for mean_RU, x in zip(means, (given.a_RU, given.b_RU), strict=True):
        mean_RU[:, -1] = x[:, -size : last - size].mean(axis=1)
    return Draws(means[0], means[1], given.truth, examples_U)


def corpus(metric: Callable[..., float], size: int, rng: np.random.Generator, draws: int, units: int) -> Draws:
    """A metric of a whole corpus, of which 30 % are positive, in batches."""

    def sample(draws: int, units: int) -> list[Array]:
        shape = (draws, units, size)
        labels = rng.random(shape) < 0.3
        shared, *noise = rng.standard_normal((3, *shape))
        return [labels, *((2 * labels - 1) * s + 0.8 * shared + 0.6 * e for s, e in zip((1, 0.85), noise, strict=True))]

    (labels,), (ours,), (theirs,) = sample(1, 10**6 // size)
    everything = range(len(labels))
    truth = metric(labels, ours, everything) - metric(labels, theirs, everything)
    labels, ours, theirs = sample(min(draws, FEW_DRAWS), units)
    return Draws(ours, theirs, truth, metric=metric, labels_RU=labels)


def f1(labels_U: Array, predicted_U: Array, chosen: Sequence[int]) -> float:
    labels, positive = labels_U[chosen], predicted_U[chosen] > 0
    return 2 * float((labels & positive).sum()) / max(1, labels.sum() + positive.sum())


def auroc(labels_U: Array, predicted_U: Array, chosen: Sequence[int]) -> float:
    labels, ranks = labels_U[chosen].ravel(), stats.rankdata(predicted_U[chosen])
    positive = int(labels.sum())
    return float(ranks[labels].sum() - positive * (positive + 1) / 2) / max(1, positive * (labels.size - positive))


def exponential(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.exponential(1, shape)


def log_normal(sigma: float, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.exp(sigma * rng.standard_normal(shape))


def ties(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (rng.random(shape) < 0.2) * rng.normal(0.3, 1, shape)


def skewed_ties(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (rng.random(shape) < 0.2) * (rng.exponential(1, shape) - 0.8)


def outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return 0.3 + rng.standard_normal(shape) * np.where(rng.random(shape) < 0.05, 10, 1)


def one_sided(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return 0.5 * rng.standard_normal(shape) + 5 * (rng.random(shape) < 0.05)


def examples() -> Mapping[str, Case]:
    exp, wide, wider = (
        (exponential, 1.0),
        (partial(log_normal, 1.0), np.exp(0.5)),
        (partial(log_normal, 1.5), np.exp(1.125)),
    )
    found: dict[str, Case] = {}
    for p, q in ((0.8, 0.8), (0.8, 0.78), (0.6, 0.65), (0.97, 0.97), (0.97, 0.96), (0.99, 0.985), (0.95, 0.7)):
        for name, overlap in (("independent", 0.0), ("correlated", 0.5), ("few discordant", 0.95)):
            found[f"{p:g}/{q:g} {name}"] = partial(answers, p, q, overlap)
        found[f"{p:g}/{q:g} unpaired"] = partial(unpaired, partial(answers, p, q, 0.0))
    for name, base in (("exponential", exp), ("log-normal 1", wide), ("log-normal 1.5", wider)):
        for factor in (1.0, 0.9, 0.7):
            found[f"{name} ×{factor:g}"] = partial(losses, *base, factor)
        found[f"{name} ×0.9 independent"] = partial(losses, *base, 0.9, independent=True)
        found[f"{name} ×0.7 unpaired"] = partial(unpaired, partial(losses, *base, 0.7))
    found |= {
        "80 % ties": partial(differences, ties, 0.06), "80 % ties, skewed": partial(differences, skewed_ties, 0.04),
        "outliers": partial(differences, outliers, 0.3), "outliers one-sided": partial(differences, one_sided, 0.25),
        "sized units, exponential": partial(sized, found["exponential ×0.9 independent"]),
        "sized units, 0.8/0.78": partial(sized, found["0.8/0.78 correlated"]),
    }  # fmt: skip
    return found


def of_batches() -> Mapping[str, Case]:
    known = examples()
    return {
        "batches of 4, exponential": partial(batches, known["exponential ×0.9"], 4),
        "batches of 32, log-normal 1": partial(batches, known["log-normal 1 ×0.9"], 32),
        "batches of 32, 0.8/0.78": partial(batches, known["0.8/0.78 correlated"], 32),
        "batches of 32, 0.97/0.96": partial(batches, known["0.97/0.96 correlated"], 32),
        "batches of 16, F1": partial(corpus, f1, 16), "batches of 16, AUROC": partial(corpus, auroc, 16),
    }  # fmt: skip


def scores(drawn: Draws, r: int) -> tuple[Score, Score]:
    """Return the two scores of draw r."""
    found: list[Score] = []
    units = drawn.a_RU.shape[1]
    examples_U = np.ones(units) if drawn.examples_U is None else drawn.examples_U
    for order, x_RU in enumerate((drawn.a_RU, drawn.b_RU)):
        value, resampled, examples = x_RU[r].mean(), None, int(examples_U.sum())
        values_U = np.zeros(units) if drawn.metric else x_RU[r]
        if drawn.metric:
            resampled = partial(drawn.metric, drawn.labels_RU[r], x_RU[r])
            value, examples = resampled(range(units)), x_RU[r].size
        elif drawn.examples_U is not None:
            value = np.average(values_U, weights=examples_U)
        each = PerExample(
            values_U=torch.from_numpy(values_U), examples_U=torch.from_numpy(examples_U),
            order=0 if drawn.paired else order,
        )  # fmt: skip
        found.append(
            Score(
                value=float(value), loss=None, metric=None, examples=examples, per_example=each, resampled=resampled,
                batches=units,
            )
        )  # fmt: skip
    return found[0], found[1]


def shipped(drawn: Draws) -> Interval:
    """Return the ends of `gain`, NaN where there is no interval."""
    gains = [gain(*scores(drawn, r)) for r in range(len(drawn.a_RU))]
    ends_R2 = np.array([(g.low, g.high) for g in gains], dtype=float)
    return ends_R2[:, 0], ends_R2[:, 1]


def coverage(ends: Interval, truth: float, shown_R: Array) -> float:
    low_R, high_R = (end[shown_R[: len(end)]] for end in ends)
    return 100 * float(((low_R <= truth) & (truth <= high_R)).mean()) if len(low_R) and low_R[0] == low_R[0] else np.nan


def line(
    case: Case, seed: int, draws: int, units: int, *, methods: bool
) -> tuple[str, float, float, Mapping[str, float]]:
    """Return the figures of a line, the share of draws with an interval, and coverages: of those, by other methods."""
    rng = np.random.default_rng([seed, units])
    drawn = case(rng, draws, units)
    low_R, high_R = ends = shipped(drawn)
    shown_R = np.isfinite(low_R)
    share = float(shown_R.mean())
    if not share:
        return f"{units:6}     0", share, np.nan, {}
    covers = coverage(ends, drawn.truth, shown_R)
    text = f"{units:6} {100 * share:5.1f}  {covers:5.1f}  {np.median((high_R - low_R)[shown_R]):7.4f}"
    plain = drawn.paired and drawn.metric is None and drawn.examples_U is None
    found = other_intervals(drawn.a_RU - drawn.b_RU, rng) if methods and plain else {}
    others = {name: coverage(ends, drawn.truth, shown_R) for name, ends in found.items()}
    columns = [others.get(name, np.nan) for name in METHODS if methods]
    return text + "".join(f" {'' if np.isnan(x) else f'{x:.1f}':>11}" for x in columns), share, covers, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="data sets for each line (%(default)s)")
    parser.add_argument("--units", type=int, nargs="+", default=[50, 100, 200, 400, 2000], help="%(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=[10, 20, 50, 200], help="%(default)s")
    parser.add_argument("--methods", action="store_true", help="also try the other methods")
    parser.add_argument("--summary", action="store_true", help="leave out the lines; implies --methods")
    parser.add_argument("--quick", action="store_true", help="200 draws, of 100 units or 20 batches")
    options = parser.parse_args()
    if options.quick:
        options.draws, options.units, options.batches = 200, [100], [20]
    warnings.simplefilter("ignore")  # scipy's, of data without variance
    reached, outside, rare, by_method = 0, list[str](), list[str](), dict[tuple[bool, str], list[bool]]()
    options.methods |= options.summary
    if not options.summary:
        names = "".join(f" {name:>11}" for name in METHODS if options.methods)
        print(f"{'95 % intervals':32}  units     %  covers    width{names}")
    cases = [(options.units, *item) for item in examples().items()]
    cases += [(options.batches, *item) for item in of_batches().items()]
    for seed, (sizes, name, case) in enumerate(cases):
        for units in sizes:
            text, share, covers, others = line(case, seed, options.draws, units, methods=options.methods)
            if not options.summary:
                print(f"{name:32} {text}", flush=True)
            for method, covered in {OWN: covers, **others}.items() if share >= RARE and others else ():
                if not np.isnan(covered):
                    by_method.setdefault((name[0].isdigit() and "/" in name, method), []).append(92 <= covered <= 98)
            reached += share >= RARE and 92 <= covers <= 98
            if share and not 92 <= covers <= 98:
                (rare if share < RARE else outside).append(f"{name}, {units}: {covers:.1f}")
    if options.summary:
        print(f"{'lines covered to 92 to 98 %':28} {'answers, 0 or 1':>16} {'losses, differences':>20}")
        for method in (OWN, *METHODS):
            known = [by_method.get((kind, method), []) for kind in (True, False)]
            figures = [f"{sum(each)} of {len(each)}" if each else "" for each in known]
            print(f"{method:28} {figures[0]:>16} {figures[1]:>20}")
    print(f"covers 92 to 98 %: {reached} of {reached + len(outside)} lines with an interval in {RARE:.0%} of the draws")
    print(f"outside: {'; '.join(outside) or 'none'}")
    print(f"outside, of those with an interval in fewer draws: {'; '.join(rare) or 'none'}")


if __name__ == "__main__":
    main()
