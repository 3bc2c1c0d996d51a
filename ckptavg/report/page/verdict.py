"""The answer of a report in one sentence, how far it can be believed, and the three facts behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ckptavg.report.json_values import coefficients, figures
from ckptavg.report.page.numbers import Report, data, interval, signed, step, steps, with_noise

Gain = Mapping[str, Any]
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
    """Top of the page: the verdict and what it is worth.

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
        if not basin:
            return Answer(sentence=f"{counts}.")
        first, _, rest = basin["verdict"].partition(". ")
        return Answer(sentence=f"{first.rstrip('.')}.", words=" ".join([rest, *basin["notes"]]))
    if kind == "evaluation":
        return Answer(sentence=f"Scores of {len(report['files']):,} files as they are.")
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


def gains(report: Report) -> dict[str, Gain]:
    """Return rival → gain of the written file on the data of the answer, of ``last``, ``best`` and plain averages.

    Without test data there are differences only, on data on which the choice was made.
    """
    split = split_of(report)
    known = dict(report.get("gains") or {})
    over_last = {row["name"]: row["over_last"][split] for row in report.get("strategies", ())}
    if split != "test":
        own = over_last.get(report.get("winner", ""))
        known = _on_seen_data(report, split) if own is None else {
            name: {**gain, "value": own["value"] - gain["value"]} for name, gain in over_last.items()
            if name != report["winner"] and None not in (own["value"], gain["value"])
        }  # fmt: skip
    if over_last and "last" not in known:
        known["last"] = over_last[report["winner"]]
    return {name: known[name] for name in ("last", "best", "swa") if name in known}


def _on_seen_data(report: Report, split: str) -> dict[str, Gain]:
    """Return baseline → difference on data on which the choice was made, without an interval."""
    own = report["scores"][split]
    others = {name: scores[split] for name, scores in report["baselines"].items()}
    by = "loss" if own.get("metric") is None else "metric"
    values = {name: score[by] for name, score in others.items() if score.get(by) is not None}
    if own.get(by) is None:
        return {}
    higher = _higher_is_better(own[by], values, worse=report["worse"]) and by == "metric"
    return {
        name: {"value": own[by] - value if higher else value - own[by], "low": None, "high": None, "separated": False}
        for name, value in values.items()
    }


def _higher_is_better(own: float, values: Mapping[str, float], *, worse: bool) -> bool:
    """Return the goal of the metric: the best single candidate is never below the last one, nor above the answer."""
    best, last = values.get("best", own), values.get("last", own)
    return (own > best) != worse if own != best else best >= last


def _scored(report: Report, averaged: str) -> Answer:
    split, name = split_of(report), name_of(report)
    measured = f"{data(split)}: " + ", ".join(
        f"{figure} {with_noise(*values)}" for figure, values in [*figures(report["scores"][split]).items()][:2]
    )
    unit = next(iter(figures(report["scores"][split])), "score")
    known = {rival: gain for rival, gain in gains(report).items() if gain.get("value") is not None}
    same = {rival for rival, gain in known.items() if _is_same(report, rival, gain)}
    names = {"last": "the last checkpoint", "best": _best(report), "swa": "the mean of all (SWA)"}
    facts = [
        _fact(f"{names.get(rival, rival)}, {unit}", gain, split, same=rival in same) for rival, gain in known.items()
    ] + _predictions(report, split)
    main = {names[rival]: gain for rival, gain in known.items() if rival in ("last", "best") and rival not in same}
    common = Answer(sentence="", averaged=averaged, measured=measured, facts=facts, words=report.get("verdict", ""))
    if report.get("replaced"):
        text = f"The selection of {name} scored worse than the best single checkpoint, which was written instead."
        return replace(common, sentence=text, level="worse", belief="On validation data (--never-worse).")
    subject = f"{name} wins" if report["kind"] == "comparison" else name
    if not main:
        if same:
            belief = "No average of the candidates was preferred to this checkpoint."
            return replace(common, sentence=f"{subject}: it is {names[min(same)]} itself.", level="no", belief=belief)
        belief = "It was not compared with a single checkpoint."
        return replace(common, sentence=f"{subject}: {measured}.", level="none", belief=belief)
    sentence = f"{subject}: {_differences(main, f'{unit} ')}."
    if split == "test":
        level, belief = _belief(main)
        belief += _higher_loss(report)
        if by := report.get("selected_by"):
            belief += f" The winner was chosen by {by} on {data(report['scored_on'])}."
        return replace(common, sentence=sentence, level=level, belief=belief)
    belief = (
        f"Measured on the {data(split)} that the choice was made on, which flatters it. Test data (test_dataloader, "
    )
    belief += "--test) or --holdout 0.2 give an interval."
    return replace(common, sentence=sentence, level="worse" if report["worse"] else "none", belief=belief)


def _differences(rivals: Mapping[str, Gain], unit: str) -> str:
    """Return the differences in a phrase, in words where an interval is below zero."""
    parts: list[str] = []
    for rival, gain in rivals.items():
        below = bool(gain.get("separated")) and gain["value"] < 0
        parts.append(f"{'WORSE, ' * below}{unit}{interval(gain)} against {rival}")
        unit = ""
    return " and ".join(parts)


def _belief(rivals: Mapping[str, Gain]) -> tuple[str, str]:
    """Return the level of a verdict on test data, and why."""
    kinds: dict[str, list[str]] = {"above": [], "below": [], "open": [], "unknown": []}
    for rival, gain in rivals.items():
        above = "above" if gain["value"] > 0 else "below"
        kinds["unknown" if gain.get("low") is None else above if gain["separated"] else "open"].append(rival)
    words = {
        "below": "is worse than {}: that 95 % interval is below zero",
        "above": "is better than {}: the 95 % interval excludes zero",
        "open": "may be no better than {}: the 95 % interval includes zero", "unknown": "has no interval against {}",
    }  # fmt: skip
    parts = [text.format(" and ".join(kinds[kind])) for kind, text in words.items() if kinds[kind]]
    if kinds["unknown"]:
        parts[-1] += f" ({rivals[kinds['unknown'][0]].get('reason') or 'unknown noise'})"
    level = "worse" if kinds["below"] else "yes" if len(kinds["above"]) == len(rivals) else "partly"
    if level == "partly" and not kinds["above"]:
        level = "no" if kinds["open"] else "none"
    return level, f"On test data, which decided nothing, it {'; it '.join(parts)}."


def _higher_loss(report: Report) -> str:
    """Return a sentence on the test loss if a metric decides, and the loss is above that of the last or best single."""
    own = report["scores"]["test"]
    others = report["baselines"] | {row["name"]: row["scores"] for row in report.get("strategies", ())}
    names = {"last": "the last checkpoint", "best": _best(report)}
    losses = {name: others[name]["test"]["loss"] for name in names if name in others}
    if own["metric"] is None or own["loss"] is None:
        return ""
    above = [
        f"{names[name]} ({signed(loss)})" for name, loss in losses.items() if loss is not None and loss < own["loss"]
    ]
    return f" But its loss, {signed(own['loss'])}, is higher than that of {' and '.join(above)}." if above else ""


def _fact(rival: str, gain: Gain, split: str, *, same: bool) -> Fact:
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


def _predictions(report: Report, split: str) -> list[Fact]:
    """Return the NLL of the averaged predictions of ``swag`` beside that of the mean's own."""
    models = report.get("predictions", {}).get(split, {})
    losses = [models[name]["score"]["loss"] for name in ("swa", "swag") if name in models]
    if len(losses) < 2 or None in losses:
        return []
    rival = f"the mean's own predictions: average of {models['swag']['models']} draws, NLL"
    order = "better" if losses[1] < losses[0] else "no better"
    meaning = f"{order}: {signed(losses[1])} instead of {signed(losses[0])}; the remarks have the interval"
    return [Fact(rival=rival, difference=signed(losses[0] - losses[1], "+"), meaning=meaning)]


def _is_same(report: Report, rival: str, gain: Gain) -> bool:
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
