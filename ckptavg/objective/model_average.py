"""The average of the predictions of several models, such as the draws of a posterior: Bayesian model averaging.

Shape suffixes: B = examples, C = classes, S = models.
"""

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ckptavg.batches.loader import BatchLoader
from ckptavg.errors import TaskError
from ckptavg.objective.counted_model import CountedModel
from ckptavg.objective.score_accumulator import ScoreAccumulator
from ckptavg.runtime.workers import Workers
from ckptavg.score import Score, Split
from ckptavg.tasks import Task
from ckptavg.tasks.probabilities import probability_metrics, reliability

STAGE: Final = "averaging predictions ({})"  # of a split


class NoLikelihoodError(TaskError):
    """Raised if the task has neither class probabilities nor a loss for each example."""


class ModelAverage:
    """Score of the averaged predictions of S models over one split.

    With class probabilities, p̄(y|x) = Σ_s p_s(y|x)/S gives NLL, accuracy, Brier score and ECE. Without them each loss
    ℓ_s is taken for −ln p_s of its example, and NLL = −logsumexp_s(−ℓ_s) + ln S. Memory: the probabilities, or one
    number, of every example of the split, in float64 on the device.

    Args:
        task: has the probabilities or the loss.
        model: the model, set to one of the S at a time.
        loader: the batches.
        split: the split to score on.
        workers: the ranks that divide the batches.
    Raises:
        NoLikelihoodError: if there are no probabilities, and the loss is a mean over a batch.
    """

    def __init__(self, task: Task, model: CountedModel, loader: BatchLoader, split: Split, workers: Workers) -> None:
        self._task = task
        self._model = model
        self._loader = loader
        self._split: Split = split
        self._workers = workers
        self._predictions: list[tuple[Tensor, Tensor | None]] = []  # per batch: Σ_s p_s [B, C] and labels, or logsumexp
        self._sizes: list[tuple[int, int, bool]] = []
        self._models = 0

    @torch.no_grad()
    def add(self) -> None:
        """Add the predictions of the model as it is now, in one pass."""
        sizes = list[tuple[int, int, bool]]()
        for number, (batch, size, checksum, counted) in enumerate(self._loader.scored(self._split, self._workers)):
            sizes.append((size, checksum, counted))
            if self._models and sizes[-1:] != self._sizes[number : number + 1]:
                break
            prediction, labels_B = self._predict(batch, size)
            if not self._models:
                self._predictions.append((prediction, labels_B))
                continue
            total, labels_B = self._predictions[number]
            total = torch.logaddexp(total, prediction) if labels_B is None else total + prediction
            self._predictions[number] = (total, labels_B)
        if self._models and sizes != self._sizes:
            message = f"{self._split}_dataloader() gives other examples, or another order, in every pass"
            raise TaskError(message, path=self._task.source, hint="fix its order, to average predictions")
        self._sizes = sizes
        self._models += 1

    def _predict(self, batch: Any, size: int) -> tuple[Tensor, Tensor | None]:
        """Return the probabilities and labels of a batch; or −ℓ [B], and None."""
        if self._task.probabilities is not None:
            with self._task.shared_forward():
                pair = self._model.call(self._task.probabilities, batch)
            if pair is not None:
                return _wide(pair[0]), pair[1]
        loss_B = self._model.call(self._task.loss, batch)
        if loss_B.numel() != size or loss_B.is_complex():
            message = "averaging predictions needs one loss per example, but loss() returns the mean of a batch"
            hint = 'reduction="none" in loss(), or predict(model, batch), which returns probabilities'
            raise NoLikelihoodError(message, path=self._task.source, hint=hint)
        return -_wide(loss_B.flatten()), None

    def score(self) -> tuple[Score, list[dict[str, float]]]:
        """Return the score, whose loss is the NLL, and the bins of a reliability diagram if there are probabilities."""
        tally, signed = ScoreAccumulator("max", None, self._workers), list[Tensor]()
        for (total, labels_B), (size, checksum, counted) in zip(self._predictions, self._sizes, strict=True):
            if not counted:
                continue
            if labels_B is None:
                tally.add(torch.tensor(self._models).log().to(total) - total, None, size, checksum)
                continue
            values = probability_metrics(total / self._models, labels_B)
            signed.append(values["ece"].cpu())
            tally.add(values["nll"], None, size, checksum, values)
        score = tally.score("the average of predictions", self._split, self._task.positions(self._split))
        if score is None:
            raise self._loader.empty(self._split)
        gathered = [part for parts in self._workers.gather(signed) for part in parts]
        return replace(score, name="nll"), reliability(torch.cat(gathered)) if gathered else []


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
