"""Result of the check of a task, and its lines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptavg.errors import printable
from ckptavg.report.display import Report
from ckptavg.score import Split


@dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """One split: its size, the score of the checkpoint and what that took."""

    examples: int
    batches: int
    seconds: float
    repeats: bool
    loss: float | None
    metric: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class TaskCheck(Report):
    """Description of a task, from running it on one checkpoint.

    Attributes:
        checkpoint: the file that was scored.
        model: class, size and BatchNorm layers of the model, in words.
        loss: what one call returns, in words.
        metric: the name of the deciding metric and its goal; "" if the task has no metric.
        searches: strategy → seconds that its search would take at its default settings, with all candidates.
        memory: what learning would take, in words.
        remarks: what the user may want to change, one line each, with the change.
        problems: what would make a run fail or its answer wrong, likewise.
    """

    checkpoint: Path
    candidates: int
    model: str
    loss: str
    metric: str
    splits: dict[Split, SplitCheck]
    searches: dict[str, float]
    memory: str
    remarks: Sequence[str] = ()
    problems: Sequence[str] = ()

    def __str__(self) -> str:
        return "\n".join(map(printable, _lines(self)))


def _lines(checked: TaskCheck) -> Iterator[str]:
    yield f"checkpoint  {checked.checkpoint}, the last of {checked.candidates} candidates"
    yield f"model       {checked.model}"
    yield f"loss        {checked.loss}"
    yield f"metric      {checked.metric or 'none: scores are of the loss'}"
    for name, split in checked.splits.items():
        figures = {"loss": split.loss, "metric": split.metric}
        scored = "".join(f", {kind} {value:.4f}" for kind, value in figures.items() if value is not None)
        repeated = "" if split.repeats else ", other examples or order in every pass"
        unit = "a score" if scored else "to read"
        counts = f"{split.examples:,} examples in {split.batches:,} batches, {split.seconds:.2f} s {unit}"
        yield f"{name:<11} {counts}{scored}{repeated}"
    searches = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in checked.searches.items())
    yield f"searches    about {searches}, of {checked.candidates} candidates"
    yield f"memory      {checked.memory}"
    for kind, lines in (("problem", checked.problems), ("remark", checked.remarks)):
        for line in lines:
            yield f"{kind}: {line}"
    if not checked.problems:
        yield "The task works." if not checked.remarks else "The task works; see the remarks."
