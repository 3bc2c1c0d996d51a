"""How good a model is as it stands: one pass over a split, by the task's loss and metric."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ckptavg.feed import Feed
from ckptavg.objective import Score, Split
from ckptavg.tally import Tally
from ckptavg.tasks import Task
from ckptavg.workers import ALONE, Workers


class Scorer:
    """Scores models of one task on what a feed gives."""

    def __init__(self, task: Task, feed: Feed) -> None:
        self._task = task
        self._feed = feed
        self._whole: dict[Split, int] = {}  # examples of a finished pass

    @property
    def divides(self) -> bool:
        """Whether a score is made of batches that workers can take one by one, rather than of the whole data."""
        return self._task.whole is None and self._task.corpus is None

    def score(
        self, model: nn.Module, split: Split, what: str, bar: float | None = None, workers: Workers = ALONE
    ) -> Score | None:
        """The score, or None as soon as it is known to stay below the bar.

        Args:
            model: in its present state.
            split: on which data.
            what: names the model in an error.
            bar: a value of `Score`; None for the whole score in any case.
            workers: who do it together, where it `divides`.
        Raises:
            TaskError: if there are no data, or loss or metric is NaN or infinite.
        """
        task = self._task
        workers = workers if self.divides else ALONE
        with torch.no_grad():
            if task.whole is not None:
                return task.whole(model)
            sign = -1.0 if task.metric_goal == "min" else 1.0
            tally, corpus = Tally(sign, task.metric_bounds, workers), task.corpus and task.corpus()
            for batch, size, mark, counted in self._feed.scored(split, workers):
                metric = None if task.metric is None else task.metric(model, batch)
                loss = task.loss(model, batch)
                if counted:
                    tally.add(loss, metric, size, mark)
                if corpus is not None:
                    corpus.update(model, batch)
                if bar is not None and split in self._whole and tally.hopeless(bar, self._whole[split]):
                    return None
        score = tally.score(what, split)
        if score is None:
            raise self._feed.empty(split)
        self._whole[split] = self._feed.examples[split]
        if corpus is None:
            return score
        figure = corpus.compute()
        return replace(
            score,
            value=sign * figure,
            metric=figure,
            resampled=lambda drawn: sign * corpus.resampled(drawn),
            batches=corpus.batches,
        )
