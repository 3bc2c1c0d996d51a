"""Scores of mixtures by the task's loss and metric, in one pass over a split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ckptavg.average import held_in_memory
from ckptavg.average.weighted_sum import output_specs
from ckptavg.batches.loader import BatchLoader, changing_data
from ckptavg.candidates import ReadInto
from ckptavg.coefficients import Coefficients
from ckptavg.cost import CostMeter
from ckptavg.errors import TaskError, is_out_of_memory
from ckptavg.objective import batchnorm
from ckptavg.objective.codecs import ScoreCodec, ScoreKey
from ckptavg.objective.counted_model import CountedModel
from ckptavg.objective.mixed_model import MixedModel
from ckptavg.objective.precision import OWN, autocast
from ckptavg.objective.remembered import Remembered
from ckptavg.objective.score_accumulator import ScoreAccumulator
from ckptavg.readers import StoredTensor
from ckptavg.runtime.workers import ALONE, Workers
from ckptavg.score import METRIC, Score, Split, decided, differs, sign, valid
from ckptavg.tasks import Task
from ckptavg.tasks.torch_metrics import CorpusMetric, Resampled, update


class _BelowError(Exception):
    """Raised when a score is sure to be below a threshold."""


class Scoring:
    """Scores of mixtures, remembered, and of the output file; BatchNorm's statistics are recomputed for each.

    Args:
        mixed: the model, which is set to the mixture that is scored.
        loader: the batches.
        meter: counts the evaluations.
        batchnorm_from: the split that BatchNorm's statistics are recomputed on.
        task: the loss and metric, if they are not those of ``mixed``.
        prefix: tells the scores from others in the journal.
    """

    def __init__(
        self, mixed: MixedModel, loader: BatchLoader, meter: CostMeter, batchnorm_from: Split,
        task: Task | None = None, prefix: str = "",
    ) -> None:  # fmt: skip
        self._mixed = mixed
        self._task = task or mixed.task
        self._loader = loader
        self._meter = meter
        self._batchnorm_from: Split = batchnorm_from
        self._scores = Remembered(ScoreCodec(self._task, mixed.run.candidates, prefix), mixed.run, meter)
        self._written = Remembered(ScoreCodec(mixed.task, mixed.run.candidates, "written "), mixed.run, meter)
        self._announced: set[ScoreKey] = set()
        self._examples: dict[Split, int] = {}  # split → examples of a finished pass
        self._orders: dict[Split, int] = {}  # split → checksum of the examples of its first pass
        self._names: list[str] = []  # of the metrics of the first pass
        self.notes: list[str] = []
        task = mixed.task
        with task.shared_forward() as shared:  # else each function is taken to run the model
            self._forwards = 1 if shared else 1 + sum(f is not None for f in (task.metric, task.predict, task.corpus))
        # the ranks that compute one score together, if its batches can be divided
        candidates_only = mixed.search.parallel == "candidates" and not mixed.search.shard
        self._together = ALONE if candidates_only else mixed.run.workers
        self._divides = mixed.task.whole is None and mixed.task.corpus is None

    def find(self, coefficients: Coefficients, on: Split | None = None, *, exact: bool = False) -> Score:
        """See `Objective.score`: of the candidate matrix, or of the ``exact`` average of the files."""
        key = self._key(coefficients, on or self._loader.scored_on, exact=exact)
        return self._scores.find(key, partial(self._loader.with_memory, partial(self._measure, key, self._together)))

    def find_at_least(self, coefficients: Coefficients, split: Split, threshold: float) -> Score | None:
        """Return the score, or None as soon as it is sure to be below ``threshold``, which is remembered as well.

        A score that is known or was announced by `prefetch` is not stopped: it is needed whole.
        """
        key = self._key(coefficients, split, exact=False)
        if key in self._announced or self._scores.known(key):
            return self.find(coefficients, split)
        journal, below = self._mixed.run.journal, f"{self._scores.codec.name(key)} below {threshold.hex()}"
        if journal.get(below, earlier=True):
            return None
        measure = partial(self._measure, key, self._together, threshold)
        try:
            return self._scores.find(key, partial(self._loader.with_memory, measure))
        except _BelowError:
            journal.add({below: True})
            return None

    def forward_batches(self, split: Split) -> int | None:
        """See `Evaluator.score_batches`."""
        task, mixed = self._task, self._mixed
        if task.whole is not None:
            return 1
        if "candidates" not in vars(mixed):
            return None  # whether there is BatchNorm is not known yet
        passes: list[tuple[Split, int]] = [(split, self._forwards)]
        if mixed.norms:
            passes.append((self._batchnorm_from, 1))
        counts = [(self._loader.known_length(part), runs) for part, runs in passes]
        return sum((count or 0) * runs for count, runs in counts) if all(count for count, _ in counts) else None

    def prefetch(self, coefficients: Sequence[Coefficients], split: Split, *, exact: bool) -> None:
        """See `Evaluator.prefetch`."""
        search, one_rank = self._mixed.search, self._mixed.run.workers.world_size == 1
        keys = [self._key(c, split, exact=exact) for c in coefficients]
        self._announced.update(keys)
        if one_rank or search.shard or search.parallel == "batches" or self._task.corpus is not None:
            return
        # fewer keys than ranks are scored faster one at a time, with all ranks on each
        whole_rounds = search.parallel == "auto" and self._divides and not self._mixed.norms

        def measure(key: ScoreKey) -> Score:
            return self._loader.with_memory(partial(self._measure, key, ALONE))

        self._scores.prefetch(keys, measure, whole_rounds=whole_rounds)

    def load_output(self, specs: Mapping[str, StoredTensor], read_into: ReadInto) -> Mapping[str, Tensor]:
        """See `Evaluator.load_output`."""
        self._mixed.candidates.load(specs, read_into)
        self._loader.with_memory(self.recompute_batchnorm)
        return self._mixed.model.state_dict()

    def score_output(
        self, coefficients: Coefficients, splits: Sequence[Split], specs: Mapping[str, StoredTensor],
        read_into: ReadInto, adapter: Mapping[str, Any] | None = None,
    ) -> Mapping[Split, Score]:  # fmt: skip
        """See `Evaluator.score_output`."""
        known = self._score_of_search(coefficients, splits[0], specs)
        model: CountedModel | None = None
        scores: dict[Split, Score] = {}
        for split in splits:

            def measure(split: Split = split) -> Score:
                nonlocal model
                model = model or self._fresh_model(specs, read_into, adapter)
                return self.evaluate(split, "the average", model)

            scores[split] = self._written.find((coefficients, split, True), partial(self._loader.with_memory, measure))
        if known is not None and differs(known, scores[splits[0]], self._mixed.eps):
            raise TaskError(
                f"the average has {_figures(scores[splits[0]])} in a fresh model, and {_figures(known)} in the one "
                "of the search: something besides the state dict decides, such as weights that are merged or cached in "
                "eval mode, or data that change from pass to pass",
                path=self._task.source, hint="compute it in the model's forward(), and merge nothing",
            )  # fmt: skip
        return scores

    def evaluate(self, split: Split, what: str, model: CountedModel | None = None) -> Score:
        """Score ``model``, by default that of the candidates, on one split; ``what`` names it in an error.

        Raises:
            TaskError: if the score is `Score.invalid`.
        """
        return valid(self._pass(split, what, self._together, model=model), self._task.source)

    def _score_of_search(
        self, coefficients: Coefficients, split: Split, specs: Mapping[str, StoredTensor]
    ) -> Score | None:
        """Return the search's score of the average, in the candidates' model; None if there is none.

        That of an exact adapter was computed in a model of its own rank.
        """
        key: ScoreKey = (coefficients, split, True)
        stacked, stored = self._is_stacked(coefficients), output_specs(self._mixed.checkpoints)
        is_equal = all(specs[name].dtype == spec.dtype for name, spec in stored.items()) if stacked else specs == stored
        if is_equal and self._scores.known(key):
            return self._scores.find(key, lambda: self.evaluate(split, "the average"))
        if stacked or (self._scores.empty and not self._mixed.norms):
            return None
        return self.evaluate(split, "the average")  # `load_output` has loaded it

    def _fresh_model(
        self, specs: Mapping[str, StoredTensor], read_into: ReadInto, adapter: Mapping[str, Any] | None = None
    ) -> CountedModel:
        """Return a new model with the tensors of a file; the candidates' model if sharded, or without memory for it.

        ``adapter`` is the adapter_config.json of an exact adapter, which the candidates' model cannot hold.
        """
        mixed = self._mixed
        if mixed.search.shard:
            return mixed.counted
        try:
            return mixed.build_from(specs, read_into, adapter)
        except (RuntimeError, MemoryError) as error:
            if adapter is not None or not is_out_of_memory(error):
                raise
            self.notes.append("the file was not scored in a fresh model: out of memory")
            return mixed.counted

    def _key(self, coefficients: Coefficients, split: Split, *, exact: bool) -> ScoreKey:
        """Return the key of a score; a single checkpoint is read from its file at no extra cost."""
        if not exact and not self._is_stacked(coefficients):
            exact = (len(coefficients.selected) == 1 or self._mixed.candidates.exact) and self._mixed.precision == OWN
        return coefficients, split, exact

    def _is_stacked(self, coefficients: Coefficients) -> bool:
        """Return whether the exact average is an adapter of other ranks than the candidates'."""
        return self._mixed.exact_adapter is not None and len(coefficients.selected) > 1

    def _measure(self, key: ScoreKey, workers: Workers, threshold: float | None = None) -> Score:
        mixed, (coefficients, split, exact) = self._mixed, key
        self._meter.evaluated()
        if mixed.exact_adapter and self._is_stacked(coefficients):
            if exact:
                mixed.candidates  # noqa: B018  # checks their memory and names before a second model
                plan = mixed.exact_adapter(coefficients)
                model = self._fresh_model(plan.specs, held_in_memory(plan), plan.config)
                return self._pass(split, mixed.describe(coefficients), workers, model=model)
            self._note("the search scored averages of the adapters' factors; the report's scores are of exact ones")
        mixed.set_to(coefficients, exact=exact or len(coefficients.selected) == 1)
        with autocast(OWN if exact else mixed.precision, mixed.run.device):
            self.recompute_batchnorm()
            return self._pass(split, mixed.describe(coefficients), workers, threshold)

    def recompute_batchnorm(self) -> None:
        """Recompute BatchNorm's statistics at the model's current weights; reads batches only if there are any."""

        def forward() -> None:
            for batch, _ in self._loader.learnable(self._batchnorm_from):
                self._mixed.counted.call(self._task.loss, batch)

        with self._mixed.plain():  # num_batches_tracked would break a compiled graph in two
            idle = batchnorm.recompute(self._mixed.norms, forward)
        if idle:
            self._note(f"loss() does not run {', '.join(idle)}: the average of their statistics stays there")

    def _pass(
        self, split: Split, what: str, workers: Workers, threshold: float | None = None, *,
        model: CountedModel | None = None,
    ) -> Score:  # fmt: skip
        """Score ``model``, by default the candidates'; raises _BelowError once it cannot reach ``threshold``."""
        task, runner = self._task, model or self._mixed.counted
        with torch.no_grad():
            if task.whole is not None:
                self._mixed.run.progress.work(1)
                return task.whole(runner.model)
            workers = workers if self._divides else ALONE
            corpus, key = task.corpus and task.corpus(), None if task.corpus else task.metric_key
            goal = "max" if task.corpus else task.metric_goal
            tally = ScoreAccumulator(goal, None if task.corpus else task.metric_bounds, workers, key=key)
            for batch, size, checksum, counted in self._loader.scored(split, workers):
                with task.shared_forward() as shared:
                    loss = runner.call(task.loss, batch)
                    call = runner.apply if shared else runner.call
                    metric = None if task.metric is None else call(task.metric, batch)
                    predicted = None if task.predict is None else call(task.predict, batch)
                    if counted:
                        tally.add(loss, metric, size, checksum, predicted)
                    if corpus is not None:
                        call(partial(update, corpus), batch)
                total = self._examples.get(split)
                if threshold is not None and total and tally.cannot_reach(threshold, total):
                    raise _BelowError
        if runner.in_training:
            self._note(
                "a function of the task runs the model or a part of it in training mode, so that dropout is on in its "
                "scores: leave train() out, or call model.eval() before"
            )
        score = tally.score(what, split, task.positions(split))
        if score is None:
            raise self._loader.empty(split)
        score = replace(score, name=task.metric_name) if score.name == METRIC else score
        self._examples[split] = self._loader.examples[split]
        names = [score.name, *score.others]
        self._names = self._names or names
        if names != self._names:
            other = f"not {', '.join(names)} for {what}, but {', '.join(self._names)} before"
            raise TaskError(f"metric() must return the same names for every model and split, {other}", path=task.source)
        if score.per_example and self._orders.setdefault(split, score.per_example.order) != score.per_example.order:
            self._note(changing_data(split))
        if corpus is None or score.invalid:
            return score
        scores = {name: self._with_metric(score, name, metric, what) for name, metric in corpus.items()}
        return decided(scores, task.metric_key or next(iter(corpus)))

    def _with_metric(self, score: Score, name: str, metric: CorpusMetric, what: str) -> Score:
        """Return ``score`` by a metric that is no mean over examples."""
        value, direction = metric.compute(), sign(self._task.metric_goal, name)
        if not math.isfinite(value):
            reason = f"{what}: the metric{'' if name == METRIC else f' {name}'} is {value}"
            return replace(score, value=-math.inf, metric=value, name=name, invalid=reason)
        return replace(
            score, value=direction * value, metric=value, name=name, resampled=Resampled(metric, direction),
            batches=metric.batches,
        )  # fmt: skip

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _figures(score: Score) -> str:
    return " and ".join(f"{name} {value:.6g}" for name, value in score.figures.items())
