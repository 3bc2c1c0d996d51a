"""Evaluator of a PyTorch task: scores and losses of mixtures, and the cost of a search."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ckptavg.average.weighted_sum import AddedNoise
from ckptavg.batches.loader import BatchLoader
from ckptavg.candidates import ReadInto
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.cost import SECONDS, Cost, CostMeter
from ckptavg.objective import Losses, batchnorm
from ckptavg.objective.derivatives import Derivatives
from ckptavg.objective.loss_log import LossLog
from ckptavg.objective.mixed_model import MixedModel, PlanAdapter
from ckptavg.objective.model_average import STAGE, ModelAverage
from ckptavg.objective.scoring import Scoring
from ckptavg.options.search import SearchOptions
from ckptavg.readers import StoredTensor
from ckptavg.report.result import MatrixResult
from ckptavg.score import Score, Split
from ckptavg.tasks import Task
from ckptavg.tasks.sampled import Sampled


class Mixture:
    """Loss and score of a mixture of checkpoints on a task; see `ckptavg.objective.evaluator.Evaluator`.

    Args:
        task: model, data, loss and metric.
        checkpoints: the N candidates, in training order.
        run: device, ranks, seed, progress and journal.
        search: how the candidates are kept, and how the model runs.
        exact_adapter: see `MixedModel`.
    """

    def __init__(
        self, task: Task, checkpoints: Sequence[Checkpoint], run: Run, search: SearchOptions | None = None,
        exact_adapter: PlanAdapter | None = None,
    ) -> None:  # fmt: skip
        self.task = task
        self.run = run
        self.n = len(checkpoints)
        self.runs: Sequence[int] = [checkpoint.run for checkpoint in checkpoints]
        self.scored_on: Split = "val" if task.has("val") else "train"
        self.splits: tuple[Split, ...] = (self.scored_on, "test") if task.has("test") else (self.scored_on,)
        self._batchnorm_from: Split = "train" if task.has("train") else self.scored_on
        self.bounded = (
            task.metric_bounds is not None and (task.metric or (task.predict and task.metric_key)) is not None
        )
        self.meter = CostMeter(run.progress.work)
        self._log = LossLog(run.journal)
        self.mixed = MixedModel(task, checkpoints, run, search or SearchOptions(), self.meter.forward, exact_adapter)
        self._loader = BatchLoader(
            task, self.scored_on, run, self.meter,
            needs_two=lambda: bool(self.mixed.norms), on_halving=self._log.keep_halving,
        )  # fmt: skip
        for _ in range(self._log.halvings):
            task.halve()  # as often as in the interrupted run, so that results are the same
        self.scoring = Scoring(self.mixed, self._loader, self.meter, self._batchnorm_from)
        self._derivatives = Derivatives(self.mixed, self._loader, self._log, self.meter)
        self.losses: Losses | None = self._derivatives if task.whole is None else None
        # the methods of `Evaluator` that need nothing else
        self.has = task.has
        self.progress = run.progress
        self.score = self.scoring.find
        self.load_output = self.scoring.load_output
        self.score_batches = self.scoring.forward_batches
        self.restart()

    def restart(self, search: str = "") -> None:
        """See `Evaluator.restart`; loaded candidates and known scores are kept."""
        self.generator = torch.Generator().manual_seed(self.run.seed)
        self._loader.restart()
        self._log.restart(search)
        self.meter.restart()

    @property
    def statistics(self) -> Collection[str]:
        """See `Evaluator.statistics`."""
        return batchnorm.statistics(self.mixed.model)

    @property
    def statistics_from(self) -> Split | None:
        """Split that BatchNorm's statistics are recomputed on; None for a model without them."""
        return self._batchnorm_from if self.mixed.norms else None

    @property
    def averaged_buffers(self) -> Collection[str]:
        """See `Evaluator.averaged_buffers`."""
        return self.mixed.candidates.averaged_buffers - batchnorm.statistics(self.mixed.model)

    @property
    def matrix(self) -> MatrixResult:
        """See `Evaluator.matrix`."""
        return self.mixed.matrix

    @property
    def notes(self) -> list[str]:
        """See `Evaluator.notes`."""
        return [*getattr(self.task, "notes", ()), *self.scoring.notes, *self._derivatives.notes, *self.mixed.notes]

    def prepare(self) -> None:
        """See `Evaluator.prepare`."""
        self.mixed.candidates  # noqa: B018  # loads them

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None, *, exact: bool = False) -> None:
        """See `Evaluator.prefetch`."""
        self.scoring.prefetch(coefficients, on or self.scored_on, exact=exact)

    def score_output(
        self, coefficients: Coefficients, specs: Mapping[str, StoredTensor], read_into: ReadInto,
        adapter: Mapping[str, Any] | None = None,
    ) -> Mapping[Split, Score]:  # fmt: skip
        """See `Evaluator.score_output`."""
        return self.scoring.score_output(coefficients, self.splits, specs, read_into, adapter)

    def average_predictions(
        self, models: Sequence[tuple[Coefficients, AddedNoise | None]], split: Split
    ) -> tuple[Score, Sequence[Mapping[str, float]]]:
        """Return the score of the averaged predictions of mixtures, each with its noise if any: see `ModelAverage`.

        The second result has the bins of a reliability diagram, if the task gives probabilities.
        """
        average = ModelAverage(self.task, self.mixed.counted, self._loader, split, self.run.workers)
        for number, (coefficients, noise) in enumerate(models, 1):
            self.mixed.set_to(coefficients, exact=True, noise=noise)
            self.scoring.recompute_batchnorm()
            average.add()
            if len(models) > 1:
                self.progress(STAGE.format(split), number, len(models))
        return average.score()

    def sampled(self, examples: int | None) -> Scoring:
        """Return scores by the loss alone, on about ``examples`` of the data: for many mixtures at little cost.

        None takes all data to score on. BatchNorm's statistics are recomputed from as many examples.
        """
        if examples is None:
            examples = Sampled(self.task, 1).total(self.scored_on)
        task = Sampled(self.task, examples)
        loader = BatchLoader(
            task, self.scored_on, self.run, self.meter,
            needs_two=lambda: bool(self.mixed.norms), on_halving=self._log.keep_halving,
        )  # fmt: skip
        scoring = Scoring(self.mixed, loader, self.meter, self._batchnorm_from, task, f"{examples} examples ")
        scoring.notes = self.scoring.notes
        return scoring

    def exact_score(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.exact_score`; scores again only if the candidate matrix is not exact."""
        return self.scoring.find(coefficients, split, exact=True)

    def score_at_least(self, coefficients: Coefficients, threshold: float, *, strict: bool) -> Score | None:
        """See `Objective.score_at_least`."""
        score = self.scoring.find_at_least(coefficients, self.scored_on, threshold)
        return score if score and (score.value > threshold if strict else score.value >= threshold) else None

    def cost(self) -> Cost:
        """See `Evaluator.cost`."""
        size = self._loader.examples.get(self._batchnorm_from) or self.task.examples(self._batchnorm_from)
        scored = self._loader.examples.get(self.scored_on) or self.task.examples(self.scored_on)
        work = self.meter["forward_examples"] + 2 * self.meter["backward_examples"]
        cost = Cost(
            forward_batches=round(self.meter["forward_batches"]),
            backward_batches=round(self.meter["backward_batches"]),
            evaluations=round(self.meter["evaluations"]), seconds=self.meter[SECONDS],
            epochs=work / (3 * size) if size else None, epochs_of=self._batchnorm_from,
            passes=work / scored if scored else None, passes_over=self.scored_on,
        )  # fmt: skip
        return self.run.workers.broadcast(cost)  # other ranks may be without a batch in the last step of a pass
