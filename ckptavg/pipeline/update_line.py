"""Line on the new checkpoints of a run beside a training: decisions, number averaged, score."""

from collections.abc import Sequence
from typing import Final

from ckptavg.errors import counted, decimal
from ckptavg.pipeline.verdict import figure
from ckptavg.report.digits import figure_places
from ckptavg.report.result import CandidateResult, Result

_DECISIONS: Final = {
    "start": "first", "soft": "accepted", "hard": "restarted from it", "reject": "rejected", "keep": "accepted",
}  # fmt: skip


def update_line(result: Result, before: Result | None, new: Sequence[CandidateResult]) -> str:
    """Return the decisions on the ``new`` candidates, the number averaged, and the score with its change."""
    words = [_DECISIONS.get(str(candidate.columns.get("decision")), "taken") for candidate in new]
    steps = [f"step {candidate.step}: {word}" for candidate, word in zip(new, words, strict=True)]
    used = sum(map(is_averaged, result.candidates))
    text = "; ".join([*steps, f"{used} of {counted(len(result.candidates), 'candidate')} averaged"])
    if not result.scores:
        return text
    score, earlier = result.scores[result.scored_on], before and before.scores[result.scored_on]
    if not earlier:
        return f"{text}, {figure(score)}"
    name = "loss" if score.metric is None else score.name
    now, then = (one.figures.get(name) for one in (score, earlier))
    text += f", {figure(score, earlier)}"
    places = figure_places([score, earlier], name)
    return text if now is None or then is None else f"{text} ({decimal(now - then, '+', places)})"


def is_averaged(candidate: CandidateResult) -> bool:
    """Return whether a candidate is part of the average."""
    coefficient = candidate.coefficient
    return any(coefficient) if isinstance(coefficient, tuple) else coefficient != 0
