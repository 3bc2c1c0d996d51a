"""Result of the check of a task, and its lines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ckptavg.errors import counted, decimal, printable
from ckptavg.report.display import Report
from ckptavg.score import Split


@dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """One split: its size, the score of the checkpoint and what that took.

    ``forwards`` counts the model's forward passes for each batch of a score.
    """

    examples: int
    batches: int
    seconds: float
    repeats: bool
    loss: float | None
    metric: float | None
    forwards: float | None


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

    kind: ClassVar[str] = "task check"

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
        return "\n".join(map(printable, self.lines()))

    def lines(self) -> Iterator[str]:
        """Yield the parts of the text, unescaped."""
        yield f"checkpoint  {self.checkpoint}, the last of {counted(self.candidates, 'candidate')}"
        yield f"model       {self.model}"
        yield f"loss        {self.loss}"
        yield f"metric      {self.metric or 'none: scores are of the loss'}"
        most = max(split.forwards or 0.0 for split in self.splits.values())
        shared = "; with forward(model, batch) in the task file, one" if most > 1 else ""
        passes = f"{most:.3g} {'pass' if most == 1 else 'passes'}"
        yield f"forward     {passes} of the model for each batch of a score{shared}"
        for name, split in self.splits.items():
            figures = {"loss": split.loss, self.metric.partition(", ")[0] or "metric": split.metric}
            scored = "".join(f", {kind} {decimal(value)}" for kind, value in figures.items() if value is not None)
            repeated = "" if split.repeats else ", other examples or order in every pass"
            unit = "per score" if scored else "to read"
            batches = f"{counted(split.examples, 'example')} in {counted(split.batches, 'batch', 'es')}"
            yield f"{name:<11} {batches}, {split.seconds:.2f} s {unit}{scored}{repeated}"
        searches = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.searches.items())
        yield f"searches    of {counted(self.candidates, 'candidate')}, about: {searches}"
        yield f"memory      {self.memory}"
        for kind, lines in (("problem", self.problems), ("remark", self.remarks)):
            for line in lines:
                yield f"{kind}: {line}"
        if not self.problems:
            yield "The task works." if not self.remarks else "The task works; see the remarks."
