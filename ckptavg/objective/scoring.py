"""How good a model is as it stands: one pass over a split, by the task's loss and metric."""

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
    """Scores models of one task on what a feed gives."""

    def __init__(self, task: Task, feed: BatchLoader) -> None:
        self._task = task
        self._feed = feed
        self._whole: dict[Split, int] = {}  # examples of a finished pass

    @property
    def divides(self) -> bool:
        """Whether a score is made of batches that workers can take one by one, rather than of the whole data."""
        return self._task.whole is None and self._task.corpus is None

    def score(
        self, model: nn.Module, split: Split, what: str, partial: PassProgress, bar: float | None = None,
        workers: Workers = ALONE,
    ) -> Score | None:  # fmt: skip
        """The score, or None as soon as it is known to stay below the bar.

        Args:
            model: in its present state.
            split: on which data.
            what: names the model in an error.
            partial: knows the batches that an earlier run has done.
            bar: a value of `Score`; None for the whole score in any case.
            workers: who do it together, where it `divides`.
        Raises:
            TaskError: if there are no data, or loss or metric is no number.
        """
        task = self._task
        workers = workers if self.divides else ALONE
        with torch.no_grad():
            if task.whole is not None:
                return task.whole(model, partial)
            sign = -1.0 if task.metric_goal == "min" else 1.0
            tally, corpus = ScoreAccumulator(sign, task.metric_bounds, workers), task.corpus and task.corpus()
            for part in partial.states:
                tally.load_state_dict(part["tally"])
                if corpus is not None:
                    corpus.load_state_dict(part["corpus"])

            def state() -> Any:
                return {"tally": tally.state_dict(), "corpus": corpus and corpus.state_dict()}

            turns = partial.remaining(self._feed.scored(split, workers), lambda: self._feed.order[split], state)
            for batch, size, mark, counted in turns:
                metric = None if task.metric is None else task.metric(model, batch)
                loss = task.loss(model, batch)
                if counted:
                    tally.add(loss, metric, size, mark)
                if corpus is not None:
                    corpus.update(model, batch)
                if bar is not None and split in self._whole and tally.cannot_reach(bar, self._whole[split]):
                    return None
        score = tally.score(what, split)
        if score is None:
            raise self._feed.empty(split)
        self._whole[split] = self._feed.examples[split]
        if corpus is None or score.invalid:
            return score
        figure = corpus.compute()
        if not math.isfinite(figure):
            return replace(score, value=-math.inf, metric=figure, invalid=f"{what}: the metric is {figure}")
        resampled = Resampled(corpus, sign)
        return replace(score, value=sign * figure, metric=figure, resampled=resampled, batches=corpus.batches)
