"""How good a model is as it stands: one pass over a split, by the task's loss and metric."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ckptavg import batches
from ckptavg.feed import Feed
from ckptavg.objective import Score, Split
from ckptavg.partial import Partial
from ckptavg.tally import Tally
from ckptavg.tasks import Task
from ckptavg.tasks.torch_metrics import Resampled


class Scorer:
    """Scores models of one task on what a feed gives."""

    def __init__(self, task: Task, feed: Feed) -> None:
        self._task = task
        self._feed = feed
        self._whole: dict[Split, int] = {}  # examples of a finished pass

    def score(
        self, model: nn.Module, split: Split, what: str, partial: Partial, bar: float | None = None
    ) -> Score | None:
        """The score, or None as soon as it is known to stay below the bar.

        Args:
            model: in its present state.
            split: on which data.
            what: names the model in an error.
            partial: knows the batches that an earlier run has done.
            bar: a value of `Score`; None for the whole score in any case.
        Raises:
            TaskError: if there are no data, or loss or metric is NaN or infinite.
        """
        task = self._task
        with torch.no_grad():
            if task.whole is not None:
                return task.whole(model, partial)
            sign = -1.0 if task.metric_goal == "min" else 1.0
            tally, corpus = Tally(sign, task.metric_bounds), task.corpus and task.corpus()
            for part in partial.states:
                tally.restore(part["tally"])
                if corpus is not None:
                    corpus.restore(part["corpus"])

            def state() -> Any:
                return {"tally": tally.part(), "corpus": corpus and corpus.part()}

            for batch in partial.rest(self._feed.scored(split), lambda: self._feed.order[split], state):
                metric = None if task.metric is None else task.metric(model, batch)
                tally.add(task.loss(model, batch), metric, batches.size(batch))
                if corpus is not None:
                    corpus.update(model, batch)
                if bar is not None and split in self._whole and tally.hopeless(bar, self._whole[split]):
                    return None
        self._whole[split] = tally.examples
        if tally.examples == 0:
            raise self._feed.empty(split)
        score = tally.score(what, split, order=self._feed.order[split])
        if corpus is None:
            return score
        figure = corpus.compute()
        resampled = Resampled(corpus, sign)
        return replace(score, value=sign * figure, metric=figure, resampled=resampled, batches=corpus.batches)
