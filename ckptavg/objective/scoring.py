"""Score a model by the task's loss and metric, in one pass over a split."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ckptavg.batches.loader import BatchLoader
from ckptavg.journal.pass_progress import PassProgress
from ckptavg.objective.score_accumulator import ScoreAccumulator
from ckptavg.runtime.workers import ALONE, Workers
from ckptavg.score import Score, Split
from ckptavg.tasks import Task
from ckptavg.tasks.torch_metrics import Resampled


class Scorer:
    """Scores models of one task on batches from a `BatchLoader`."""

    def __init__(self, task: Task, loader: BatchLoader) -> None:
        self._task = task
        self._loader = loader
        self._examples: dict[Split, int] = {}  # split → examples of a finished pass

    @property
    def divides(self) -> bool:
        """True if ranks can divide the batches of a score; False if its metric needs the whole split."""
        return self._task.whole is None and self._task.corpus is None

    def score(
        self, model: nn.Module, split: Split, what: str, partial: PassProgress, threshold: float | None = None,
        workers: Workers = ALONE,
    ) -> Score | None:  # fmt: skip
        """Score ``model`` on ``split``; return None as soon as the score cannot reach ``threshold``.

        Args:
            model: the model to score, in its current state.
            split: the split.
            what: the name of the model in an error.
            partial: the batches that an interrupted run has already scored.
            threshold: a value of `Score`; None always finishes the pass.
            workers: the ranks that divide the batches, if the score `divides`.
        Raises:
            TaskError: if the split has no batches, or the loss or metric is not a number.
        """
        task = self._task
        workers = workers if self.divides else ALONE
        with torch.no_grad():
            if task.whole is not None:
                return task.whole(model, partial)
            sign = -1.0 if task.metric_goal == "min" else 1.0
            tally, corpus = ScoreAccumulator(sign, task.metric_bounds, workers), task.corpus and task.corpus()
            for saved in partial.states:
                tally.load_state_dict(saved["tally"])
                if corpus is not None:
                    corpus.load_state_dict(saved["corpus"])

            def state() -> Any:
                return {"tally": tally.state_dict(), "corpus": corpus and corpus.state_dict()}

            remaining = partial.remaining(self._loader.scored(split, workers), lambda: self._loader.order[split], state)
            for batch, size, checksum, counted in remaining:
                metric = None if task.metric is None else task.metric(model, batch)
                loss = task.loss(model, batch)
                if counted:
                    tally.add(loss, metric, size, checksum)
                if corpus is not None:
                    corpus.update(model, batch)
                if (
                    threshold is not None
                    and split in self._examples
                    and tally.cannot_reach(threshold, self._examples[split])
                ):
                    return None
        score = tally.score(what, split)
        if score is None:
            raise self._loader.empty(split)
        self._examples[split] = self._loader.examples[split]
        if corpus is None or score.invalid:
            return score
        value = corpus.compute()
        if not math.isfinite(value):
            return replace(score, value=-math.inf, metric=value, invalid=f"{what}: the metric is {value}")
        resampled = Resampled(corpus, sign)
        return replace(score, value=sign * value, metric=value, resampled=resampled, batches=corpus.batches)
