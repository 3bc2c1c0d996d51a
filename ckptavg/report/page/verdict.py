"""The answer of a report in one sentence, how far it can be believed, and the three facts behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ckptavg.report.page.numbers import Report, coefficients, data, figures, interval, signed, step, steps, with_noise

_LEVELS: Final = {
    "yes": ("✔", "Evidence"), "partly": ("◐", "Part evidence"), "no": ("≈", "Not distinguishable"),
    "worse": ("✘", "Worse"), "none": ("?", "No evidence"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A rival of the written file: its name, the difference in words, and what that is worth."""

    rival: str
    difference: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a reader sees first.

    Attributes:
        sentence: the verdict with its interval.
        level: how far it can be believed: yes, partly, no, worse, none; empty where there is nothing to judge.
        belief: why.
        averaged: which candidates were averaged.
        measured: the score of the written file.
        facts: its difference to each rival.
        words: the verdict as the terminal prints it.
    """

    sentence: str
    level: str = ""
    belief: str = ""
    averaged: str = ""
    measured: str = ""
    facts: Sequence[Fact] = ()
    words: str = ""

    @property
    def badge(self) -> tuple[str, str]:
        """A sign and one or two words for the level."""
        return _LEVELS[self.level]


def answer(report: Report) -> Answer:
    """Return the answer of a report of any kind."""
    kind = report["kind"]
    if kind == "landscape":
        negative = sum(value is not None and value < 0 for value in report["eigenvalues"])
        text = f"A quadratic predicts the loss around the mean of {len(report['steps'])} candidates with R² "
        text += f"{signed(report['r_squared'])} and Spearman {signed(report['spearman'])}."
        return Answer(sentence=text, words=f"{negative} of {len(report['eigenvalues'])} eigenvalues are negative.")
    if kind == "inspection":
        basin = report.get("basin")
        counts = f"{len(report['candidates']):,} candidates, {len(report['left_out']):,} files left out"
        return Answer(sentence=basin["verdict"] if basin else counts, words="; ".join(basin["notes"]) if basin else "")
    if kind not in ("average", "comparison", "posterior"):
        return Answer(sentence=f"Report of ckptavg: {kind}")
    if report.get("output") is None:
        return Answer(sentence=f"Nothing was written by {report['strategy']}: this was a dry run.")
    averaged = _averaged(report)
    if not report.get("scores"):
        return Answer(
            sentence=f"{name_of(report)} wrote {averaged[0].lower()}{averaged[1:]}; nothing was scored.", level="none",
            belief="There is no task, so nobody knows whether it is better than a single checkpoint. "
            "Give a task file with --task.", averaged=averaged,
        )  # fmt: skip
    return _scored(report, averaged)


def name_of(report: Report) -> str:
    """Return the strategy of a report as it was asked for."""
    return report.get("winner") or ("swag (mean)" if report["kind"] == "posterior" else report["strategy"])


def split_of(report: Report) -> str:
    """Return the data of the answer: test data if there are any."""
    return "test" if "test" in report["scores"] else report["scored_on"]


def gains(report: Report) -> dict[str, Mapping[str, Any]]:
    """Return rival → gain of the written file on the data of the answer, of ``last``, ``best`` and plain averages.

    Without test data there are differences only, on data on which the choice was made.
    """
    split = split_of(report)
    known = dict(report.get("gains") or {})
    for row in report.get("strategies", ()):
        if row["name"] == report["winner"]:
            known["last"] = row["over_last"][split]
    if split == "test" and known:
        return {name: known[name] for name in ("last", "best", "swa") if name in known}
    return known


def _scored(report: Report, averaged: str) -> Answer:
    split, name = split_of(report), name_of(report)
    measured = f"{data(split)}: " + ", ".join(
        f"{figure} {with_noise(*values)}" for figure, values in [*figures(report["scores"][split]).items()][:2]
    )
    unit = next(iter(figures(report["scores"][split])), "score")
    known = {rival: gain for rival, gain in gains(report).items() if gain.get("value") is not None}
    same = {rival for rival, gain in known.items() if _is_same(report, rival, gain)}
    names = {"last": "the last checkpoint", "best": _best(report), "swa": "the mean of all (SWA)"}
    facts = [_fact(names.get(rival, rival), gain, split, same=rival in same) for rival, gain in known.items()]
    main = {names[rival]: gain for rival, gain in known.items() if rival in ("last", "best") and rival not in same}
    common = Answer(sentence="", averaged=averaged, measured=measured, facts=facts, words=report.get("verdict", ""))
    if report.get("replaced"):
        text = f"The selection of {name} scored worse than the best single checkpoint, which was written instead."
        return replace(common, sentence=text, level="worse", belief="On validation data (--never-worse).")
    count, n = sum(any(coefficients(c)) for c in report["candidates"]), len(report["candidates"])
    subject = f"{name} ({count} of {n} checkpoints){' wins' if report['kind'] == 'comparison' else ''}"
    if not main:
        if same:
            sentence = f"{subject}: it is {names[min(same)]} itself, no average."
            belief = "No average of the candidates was preferred to this checkpoint."
            return replace(common, sentence=sentence, level="no", belief=belief)
        sentence = f"{subject}, with {measured}; it was not compared with a single checkpoint."
        return replace(common, sentence=sentence, level="none", belief="No difference was measured.")
    if split != "test":
        parts = [f"{signed(gain['value'], '+')} to {rival}" for rival, gain in main.items()]
        where = data(split)
        sentence = (
            f"{subject} on {where} ({unit} {' and '.join(parts)}), but without an interval: it chose on these data."
        )
        if report["worse"]:
            sentence = f"{subject}: WORSE than the best single checkpoint on {where} ({unit} {' and '.join(parts)})."
        belief = "The choice was made on these data, which flatters it. Test data, or --holdout 0.2, give an interval."
        return replace(common, sentence=sentence, level="worse" if report["worse"] else "none", belief=belief)
    sentence = f"{subject}: {' and '.join(_phrase(rival, gain, unit) for rival, gain in main.items())}, on test data."
    level, belief = _belief(main)
    return replace(common, sentence=sentence, level=level, belief=belief)


def _belief(gains_of: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Return the level of a verdict on test data, and why."""
    better = [rival for rival, gain in gains_of.items() if gain["separated"] and gain["value"] > 0]
    worse = [rival for rival, gain in gains_of.items() if gain["separated"] and gain["value"] < 0]
    unknown = [rival for rival, gain in gains_of.items() if gain.get("low") is None]
    clean = "Test data decided nothing"
    if worse:
        return "worse", f"{clean}, and the 95 % interval of the difference to {' and '.join(worse)} is below zero."
    if len(better) == len(gains_of):
        verb = "excludes" if len(better) == 1 else "exclude"
        return "yes", f"{clean}, and the 95 % interval{'s' * (len(better) > 1)} {verb} zero."
    rest = [rival for rival in gains_of if rival not in better]
    why = "there is no interval" if set(rest) <= set(unknown) else "the interval includes zero"
    if set(rest) <= set(unknown):
        why += f" ({gains_of[rest[0]]['reason']})"
    if better:
        return (
            "partly",
            f"{clean}. Against {' and '.join(better)} the interval excludes zero; against {' and '.join(rest)} {why}.",
        )
    return ("none" if set(rest) <= set(unknown) else "no"), f"{clean}, but {why}: the difference may be chance."


def _phrase(rival: str, gain: Mapping[str, Any], unit: str) -> str:
    span = "" if gain.get("low") is None else f" [{signed(gain['low'], '+')}, {signed(gain['high'], '+')}]"
    value = signed(gain["value"], "+")
    if gain["separated"]:
        return f"{'better' if gain['value'] > 0 else 'WORSE'} than {rival} by {unit} {value}{span}"
    if span:
        return f"not distinguishable from {rival}, {unit} {value}{span}"
    return f"{unit} {value} to {rival}, without an interval"


def _fact(rival: str, gain: Mapping[str, Any], split: str, *, same: bool) -> Fact:
    if same:
        return Fact(rival=rival, difference="0", meaning="the same model")
    if split != "test":
        return Fact(rival=rival, difference=interval(gain), meaning="no evidence: chosen on these data")
    if gain.get("low") is None:
        return Fact(
            rival=rival, difference=interval(gain), meaning=f"no interval: {gain.get('reason') or 'unknown noise'}"
        )
    better = "better" if gain["value"] > 0 else "worse"
    meaning = (
        f"{better}: the interval excludes zero" if gain["separated"] else "may be chance: the interval includes zero"
    )
    return Fact(rival=rival, difference=interval(gain), meaning=meaning)


def _is_same(report: Report, rival: str, gain: Mapping[str, Any]) -> bool:
    """Return whether the written file is that single candidate."""
    used = [c for c in report["candidates"] if any(coefficients(c))]
    if len(used) != 1 or gain["value"] != 0 or report.get("replaced"):
        return rival == "swa" and report["strategy"] == "swa"
    return rival == "best" or (rival == "last" and used[0] is report["candidates"][-1])


def _best(report: Report) -> str:
    number = report.get("best_step")
    for row in report.get("strategies", ()):
        if row["name"] == "best":
            steps_of = zip(report["candidates"], row["coefficients"], strict=True)
            number = next(candidate["step"] for candidate, weight in steps_of if weight)
    return "the best single checkpoint" + (f" (step {step(number)})" if number is not None else "")


def _averaged(report: Report) -> str:
    candidates = report["candidates"]
    used = [c for c in candidates if any(coefficients(c))]
    numbers, n = [c["step"] for c in used], len(candidates)
    if len(used) == 1:
        return f"One of {n} checkpoints: step {step(numbers[0])}"
    weights = [value for c in used for value in coefficients(c)]
    equal = len(report["groups"]) == 1 and max(weights) == min(weights)
    how = "The mean" if equal else "A weighted sum" if min(weights) < 0 else "A weighted mean"
    whole = f"all {n}" if len(used) == n else f"{len(used)} of {n}"
    return f"{how} of {whole} checkpoints: steps {steps(numbers)}"
