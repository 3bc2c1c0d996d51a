"""Objective of a PyTorch task: mixes the candidates, caches scores and counts the cost of the search.

Shape suffixes: N = candidates, G = groups of tensors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor, nn

from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.batches import data_parallel
from ckptavg.batches.loader import BatchLoader
from ckptavg.batches.stream import BatchStream, LocalShard
from ckptavg.candidates import Candidates, ReadInto, sharded
from ckptavg.candidates.plan import Offload, Plan
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.cost import SECONDS, Cost, CostMeter
from ckptavg.errors import TaskError, UsageError, is_out_of_memory
from ckptavg.journal.pass_progress import PassProgress, resumed
from ckptavg.objective import Hessian, Parallel, batchnorm, curvature
from ckptavg.objective.loss import MixtureLoss, loss_and_gradient
from ckptavg.objective.measurements import MeasurementLog, score_key
from ckptavg.objective.precision import OWN, Compiled, autocast
from ckptavg.objective.score_cache import Key, ScoreCache
from ckptavg.objective.scoring import Scorer
from ckptavg.readers import StoredTensor
from ckptavg.report.result import MatrixResult
from ckptavg.runtime.progress import Watch
from ckptavg.runtime.workers import ALONE, Workers
from ckptavg.score import Score, Split, valid
from ckptavg.surrogate import Surrogate
from ckptavg.tasks import Task
from ckptavg.tasks import batch as batches

_T = TypeVar("_T")
_PROGRESS_INTERVAL: Final = 0.1  # seconds between progress reports: reading metrics synchronises with the device


class Mixture:
    """Loss and score of a mixture of checkpoints on a task; see `ckptavg.objective.Objective`.

    Args:
        task: model, data, loss and metric.
        checkpoints: the N candidates, in training order.
        device: the device of the model and the candidates.
        seed: seed of all random numbers; loaders get seeds derived from it, so shuffling repeats.
        bits: bits per element of the candidate matrix; ``auto`` is the most that fits the device.
        group_size: elements that share a scale and a zero point if ``bits`` < 32.
        offload: storage of the matrix if it is not kept on the device.
        precision: precision of the passes of a search; ``float32`` keeps the model's own, which the report's scores
            always use.
        compiled: run the model's forward through torch.compile.
        watch: progress callback, called a few times a second.
        log: measurements of an interrupted run of the same command.
        workers: the ranks that divide the work; each holds all candidates, the model and the data.
        parallel: what the ranks divide in a score: the ``batches``, or the ``candidates`` if several are requested.
        shard: give each rank a shard of every candidate and of the model instead; all ranks run every batch together.
    """

    def __init__(
        self,
        task: Task,
        checkpoints: Sequence[Checkpoint],
        *,
        device: torch.device,
        seed: int = 0,
        bits: int | Literal["auto"] = 32,
        group_size: int = 128,
        offload: Offload = "none",
        precision: str = OWN,
        compiled: bool = False,
        watch: Watch | None = None,
        log: MeasurementLog | None = None,
        workers: Workers = ALONE,
        parallel: Parallel = "auto",
        shard: bool = False,
    ) -> None:
        self.task = task
        self._seed = seed
        self.checkpoints = checkpoints
        self._device = device
        self._asked_bits: int | Literal["auto"] = bits
        self.group_size = group_size
        self._offload: Offload = offload
        self._precision = precision
        self._compile = compiled
        self._compiled: Compiled | None = None
        self.watch = watch
        self._log = log
        self._workers = workers
        self._parallel: Parallel = parallel
        self._shard = shard
        self._divided: dict[Split, bool] = {}
        self._notes: list[str] = []
        self._last_report = 0.0
        self.scored_on: Split = "val" if task.has("val") else "train"
        self.splits: tuple[Split, ...] = (self.scored_on, "test") if task.has("test") else (self.scored_on,)
        self.batchnorm_from: Split = "train" if task.has("train") else self.scored_on
        self._gradients: dict[tuple[Coefficients, Split, str], tuple[float, Tensor]] = {}
        self._surrogates: dict[tuple[Split, Hessian], Surrogate] = {}
        self.meter = CostMeter()
        self._scores = ScoreCache(task, self.meter, log)
        for _ in range(0 if log is None else log.halvings):
            task.halve()  # as often as in the interrupted run, so that results are the same
        self._loader = BatchLoader(task, self.scored_on, device, seed, self.meter, workers)
        self._scorer = Scorer(task, self._loader)
        self.restart()

    def restart(self) -> None:
        """Start a new search: reset the random generator, the batch streams and the cost.

        Loaded candidates and cached scores are kept; `cost` charges for cached scores as if they were measured again.
        """
        self.generator = torch.Generator().manual_seed(self._seed)
        self._loader.restart()
        if self._log is not None:
            self._log.restart()
        self.meter.restart()

    @cached_property
    def candidates(self) -> Candidates:
        """Candidate matrix and model; loaded on first use, after the strategy has checked its settings."""
        torch.manual_seed(self._seed)
        workers = self._workers if self._shard else ALONE
        if self._shard:
            model = sharded.build(self.task.model, self._device, workers)
        else:
            model = self.task.model()
            if empty := next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None):
                message = f"model() must be ready to run, but its {empty} is on the meta device: allocate it"
                raise TaskError(message, path=self.task.source)
            model = model.to(self._device).eval()
        plan = Plan.of(
            model, self.n, bits=self._asked_bits, group_size=self.group_size, offload=self._offload,
            device=self._device, parts=workers.world_size, sharing=self._workers.local_world_size,
        )  # fmt: skip
        memory_use = plan.check()
        if self.watch and self.n > 1:
            self.watch(memory_use, 0, 0, {})
        bits = min(self._workers.gather(plan.bits))  # also a barrier: no rank allocates before all have checked memory
        candidates = Candidates(
            model, self.checkpoints, self.progress,
            bits=bits, group_size=self.group_size, offload=self._offload, workers=workers,
        )  # fmt: skip
        for checkpoint in self.checkpoints:
            checkpoint.check_unchanged()  # now, rather than only at the end of a long search
        if self._compile:
            self._compiled = Compiled(model)
        return candidates

    @property
    def differentiable(self) -> bool:
        """See `Objective.differentiable`."""
        return self.task.whole is None

    @property
    def bounded(self) -> bool:
        """See `Evaluator.bounded`."""
        return self.task.metric is not None and self.task.metric_bounds is not None

    def has(self, split: Split) -> bool:
        """See `Evaluator.has`."""
        return self.task.has(split)

    @property
    def matrix(self) -> MatrixResult:
        """See `Evaluator.matrix`."""
        candidates = self.candidates
        return MatrixResult(
            bits=candidates.bits,
            group_size=None if candidates.exact else self.group_size,
            bytes=candidates.nbytes,
            error=candidates.error,
            offload=self._offload if candidates.streamed else "none",
            precision=self._precision,
            compiled=self._compiled is not None and self._compiled.failure is None,
        )

    @property
    def notes(self) -> list[str]:
        """See `Evaluator.notes`."""
        notes = [*getattr(self.task, "notes", ()), *self._notes]
        if self._offload == "cpu" and self._device.type == "cpu":
            notes.append("--offload cpu changes nothing on a CPU: the candidates are in its memory already")
        if self._compiled is not None and self._compiled.failure is not None:
            notes.append(f"--compile was given up, and the model ran as it is: {self._compiled.failure}")
        return notes

    def prepare(self) -> None:
        """See `Evaluator.prepare`."""
        self.candidates  # noqa: B018  # loads them

    @property
    def model(self) -> nn.Module:
        """Model on the device."""
        return self.candidates.model

    @cached_property
    def _norms(self) -> Collection[batchnorm.Layer]:
        norms = list(batchnorm.layers(self.model).values())
        self._loader.needs_two = bool(norms)
        return norms

    @property
    def n(self) -> int:
        """Number of candidates N."""
        return len(self.checkpoints)

    def step(self, i: int) -> int:
        """Return the training step of candidate ``i``."""
        return self.checkpoints[i].step

    def uniform(self) -> Tensor:
        """See `Objective.uniform`."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64  # mps has no float64
        return torch.full((self.n,), 1 / self.n, dtype=dtype, device=self._device)

    def batches(self, on: Split) -> int:
        """See `Objective.batches`."""
        return self._loader.length(on)

    def blocks(self, size: int | None) -> Groups:
        """See `Objective.blocks`."""
        return self.candidates.blocks(size)

    def distances(self, groups: Groups) -> Tensor:
        """See `Objective.distances`."""
        return self.candidates.distances(groups).to(self.uniform().dtype)

    def loss(self, c_N: Tensor, on: Split | None = None, *, groups: Groups = EVERYTHING, again: bool = False) -> Tensor:
        """See `Objective.loss`; runs forward and backward together, so no graph outlives the call."""
        advance = not again

        def work() -> Tensor:
            nonlocal advance
            if self._log is not None and self._log.halved():
                self._loader.restart(halved=True)
                advance = True
            split = on or self.scored_on
            stream = self._loader.stream(split, lambda: self._divides(split))
            if advance:
                stream.advance()
            advance = True  # a retry runs with smaller batches, so the previous one cannot be reused
            return MixtureLoss.apply(c_N, self._step(stream, groups))  # pyright: ignore

        return self._with_memory(work)

    def surrogate(self, on: Split | None = None, hessian: Hessian = "auto") -> Surrogate:
        """See `Objective.surrogate`; cached."""
        self._check_whole()
        key = (on or self.scored_on, hessian)
        if key in self._surrogates:
            self.meter.charge(key)
            return self._surrogates[key]
        norms, split, name = self._norms, key[0], f"surrogate {' '.join(key)}"
        if self._log is not None and (recorded := self._log.surrogate(name)):
            self._surrogates[key] = recorded
            return recorded

        def batches_with_progress() -> Iterator[Any]:
            for done, batch in enumerate(self._loader.learnable(split, self._workers), 1):
                yield batch
                total = self.batches(split)
                self.progress("measuring the curvature", min(total, done * self._workers.world_size), total)

        def work() -> Surrogate:
            counts = torch.zeros(2, 2, dtype=torch.int64)
            kinds = ("forward", "backward")

            def count(kind: str, examples: int) -> None:
                counts[kinds.index(kind)] += torch.tensor([1, examples])

            with batchnorm.batch_statistics(norms), self._plain():
                surrogate = curvature.surrogate(
                    self.candidates, batches_with_progress, self.task.loss,
                    hessian=hessian, count=count, source=self.task.source, workers=self._workers,
                    order=lambda: self._loader.order[split], partial=lambda kind: self._partial(f"{name} {kind}"),
                )  # fmt: skip
            for kind, (number, examples) in zip(kinds, self._workers.sum(counts).tolist(), strict=True):
                self.meter.count(kind, examples, number)
            return surrogate

        with self.meter.pricing(key):
            self._surrogates[key] = self._with_memory(work)
        if self._log is not None:
            self._log.keep_surrogate(name, self._surrogates[key])
        return self._surrogates[key]

    def gradient(self, coefficients: Coefficients, on: Split | None = None) -> tuple[float, Tensor]:
        """See `Objective.gradient`; cached. Each rank runs its own batches; 3 + N numbers are summed at the end."""
        split, c_N = on or self.scored_on, self.uniform().new_tensor(coefficients.values[0])
        self._check_whole()
        key = (coefficients, split, "gradient")
        if key in self._gradients:
            self.meter.charge(key)
            return self._gradients[key]
        name = f"gradient {score_key(coefficients, split, exact=False)}"
        if self._log is not None and (recorded := self._log.gradient(name)):
            self._gradients[key] = recorded
            return recorded

        def work() -> Tensor:
            total, examples, count = torch.zeros_like(torch.cat([c_N, c_N[:1]])), 0, 0
            for batch in self._loader.learnable(split, self._workers):
                share = LocalShard(batch, batches.size(batch), 1.0)
                loss, gradient_N = loss_and_gradient(
                    self.task, self.candidates, self._norms, c_N, share, EVERYTHING, self._precision, ALONE
                )
                total += share.size * torch.cat([gradient_N, loss.view(1)])
                examples, count = examples + share.size, count + 1
            return self._workers.sum(torch.cat([total, total.new_tensor([examples, count])]))

        with self.meter.pricing(key):
            *totals, examples, count = self._with_memory(work).tolist()
            self.meter.count("backward", round(examples), round(count))
        *gradient, value = (total / examples for total in totals)
        if not math.isfinite(value):
            message = f"loss() is {value} on the {split} data, of {self._describe(coefficients)}"
            raise TaskError(message, path=self.task.source)
        gradient_N = torch.tensor(gradient, dtype=torch.float64)
        gradient_N -= gradient_N.mean()
        self._gradients[key] = value, gradient_N
        if self._log is not None:
            self._log.keep_gradient(name, value, gradient_N)
        return self._gradients[key]

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None, *, exact: bool = False) -> None:
        """See `Objective.prefetch` and `Evaluator.prefetch`."""
        workers = self._workers
        if workers.world_size == 1 or self._shard or self._parallel == "batches" or self.task.corpus is not None:
            return
        split: Split = on or self.scored_on
        keys = self._scores.missing((c, split, exact or self._scored_exactly(c)) for c in coefficients)
        if self._parallel == "auto" and self._scorer.divides and not self._norms:
            # fewer keys than ranks are scored faster one at a time, with all ranks on each
            del keys[len(keys) - len(keys) % workers.world_size :]

        def measure(key: Key) -> tuple[Score, dict[str, float]]:
            with self.meter.measure() as spent:
                score = self._measure_score(key, None, ALONE)
            assert score is not None
            return score, spent | {SECONDS: spent[SECONDS] / workers.world_size}

        for done, (key, (score, spent)) in enumerate(workers.map_parallel(keys, measure), 1):
            self.meter.price(key, spent)
            self._scores.keep(key, score)
            self.progress("scoring in parallel", done, len(keys))

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """See `Objective.score`."""
        return self._full_score(coefficients, on or self.scored_on, exact=self._scored_exactly(coefficients))

    def exact_score(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.exact_score`; scores again only if the candidate matrix is not exact."""
        return self._full_score(coefficients, split, exact=True)

    def score_at_least(self, coefficients: Coefficients, threshold: float, *, strict: bool) -> Score | None:
        """See `Objective.score_at_least`."""
        exact = self.candidates.exact and self._precision == OWN
        score = self._cached_score(coefficients, self.scored_on, exact=exact, threshold=threshold)
        return score if score and (score.value > threshold if strict else score.value >= threshold) else None

    def progress(self, stage: str, done: int, total: int, **metrics: Tensor | float) -> None:
        """See `Objective.progress`."""
        now = time.perf_counter()
        if self.watch and (done == total or now - self._last_report > _PROGRESS_INTERVAL):
            self._last_report = now
            self.watch(stage, done, total, {name: float(value) for name, value in metrics.items()})

    def load(self, specs: Mapping[str, StoredTensor], read_into: ReadInto) -> None:
        """Load the weights of a file into the model."""
        self.candidates.load(specs, read_into)

    @property
    def statistics(self) -> Collection[str]:
        """See `Evaluator.statistics`."""
        return batchnorm.statistics(self.model)

    def load_output(
        self, coefficients: Coefficients, specs: Mapping[str, StoredTensor], read_into: ReadInto
    ) -> Mapping[str, Tensor]:
        """See `Evaluator.load_output`."""
        self.load(specs, read_into)
        self._with_memory(lambda: self.recompute_batchnorm(_output_key(coefficients, self.batchnorm_from)))
        state = self.model.state_dict()
        return {name: state[name] for name in self.statistics}

    def score_output(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.score_output`."""
        key = _output_key(coefficients, split)
        score = None if self._log is None else self._log.score(key, self.task)
        if score is None:
            score = self._with_memory(lambda: self.evaluate(split, "the average", key))
            if self._log is not None:
                self._log.keep_score(key, score)
        return score

    def recompute_batchnorm(self, key: str = "") -> None:
        """Recompute BatchNorm's statistics at the model's current weights, on training data if the task has any.

        Args:
            key: the journal key of these weights; "" if they are not in the journal.
        """
        norms, split, partial = self._norms, self.batchnorm_from, self._partial(key and f"{key} batchnorm")

        def forward() -> None:
            batches, order = self._loader.learnable(split), lambda: self._loader.order[split]
            for batch in partial.remaining(batches, order, lambda: batchnorm.statistics_of(norms), whole=True):
                self.task.loss(self.model, batch)

        with self._plain():  # num_batches_tracked would break a compiled graph in two
            resumed(partial, lambda: batchnorm.recompute(norms, forward, next(reversed(partial.states), None)))

    def _plain(self) -> AbstractContextManager[None]:
        return nullcontext() if self._compiled is None else self._compiled.paused()

    def evaluate(self, split: Split, what: str, key: str = "") -> Score:
        """Score the model's current state on one split.

        Args:
            split: the split.
            what: the name of the model in an error.
            key: the journal key of these weights and the split.
        Raises:
            TaskError: if the score is `Score.invalid`.
        """
        score = self._pass(split, what, None, key, self._shared)
        assert score is not None  # only a threshold stops a score early
        return valid(score, self.task.source)

    def cost(self) -> Cost:
        """Return the cost since the start, or since the last `restart`."""
        size = self._loader.examples.get(self.batchnorm_from) or self.task.examples(self.batchnorm_from)
        work = self.meter["forward_examples"] + 2 * self.meter["backward_examples"]
        return Cost(
            forward_batches=round(self.meter["forward_batches"]),
            backward_batches=round(self.meter["backward_batches"]),
            evaluations=round(self.meter["evaluations"]),
            seconds=self.meter[SECONDS],
            epochs=work / (3 * size) if size else None,
            epochs_of=self.batchnorm_from,
        )

    @property
    def _shared(self) -> Workers:
        """Ranks that compute one score together."""
        return ALONE if self._parallel == "candidates" and not self._shard else self._workers

    def _check_whole(self) -> None:
        if self._shard:
            raise UsageError("a sharded model has no second derivatives here", hint="--solver gumbel or gradient")

    def _divides(self, split: Split) -> bool:
        """Return whether ranks divide the batches of this split; decided once, on its first batch."""
        if self._workers.world_size == 1:
            return False
        if split not in self._divided:
            reason = "BatchNorm needs the whole batch" if self._norms else self._obstacle(split)
            self._divided[split] = reason is None
            if reason is not None:
                self._notes.append(f"every worker ran whole batches of the {split} data, because {reason}")
        return self._divided[split]

    def _obstacle(self, split: Split) -> str | None:
        self.candidates.materialize(self.uniform())
        batch = next(self._loader.first(split), None)
        if batch is None:
            raise self._loader.empty(split)
        with self._plain():
            return data_parallel.obstacle(
                lambda part: self.task.loss(self.model, part), batch, self._device, self._workers
            )

    def _step(self, stream: BatchStream, groups: Groups) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def compute(c_GN: Tensor) -> tuple[Tensor, Tensor]:
            # loading the candidates draws random numbers, so it comes before the batch, which is seeded
            candidates, norms = self.candidates, self._norms
            share = stream.share
            self.meter.count("forward", share.size)
            loss, gradient_GN = loss_and_gradient(
                self.task, candidates, norms, c_GN, share, groups, self._precision, self._workers
            )
            self.meter.count("backward", share.size)
            return loss, gradient_GN

        def log(c_GN: Tensor) -> tuple[Tensor, Tensor]:
            assert self._log is not None
            key, recorded = self._log.loss(c_GN)
            if recorded is None:
                recorded = compute(c_GN)
                self._log.keep_loss(key, c_GN, *recorded)
            return recorded

        return compute if self._log is None else log

    def _full_score(self, coefficients: Coefficients, split: Split, *, exact: bool) -> Score:
        score = self._cached_score(coefficients, split, exact=exact)
        assert score is not None  # only a threshold stops a score early
        return score

    def _cached_score(
        self, coefficients: Coefficients, split: Split, *, exact: bool, threshold: float | None = None
    ) -> Score | None:
        """Return the score; None, which is not cached, if it cannot reach the threshold."""
        key = (coefficients, split, exact)
        return self._scores.find(key, lambda: self._measure_score(key, threshold, self._shared), threshold)

    def _measure_score(self, key: Key, threshold: float | None, workers: Workers) -> Score | None:
        coefficients, split, exact = key
        self.meter.evaluated()
        self._mix(coefficients, exact=exact or len(coefficients.selected) == 1)
        precision, what = OWN if exact else self._precision, self._describe(coefficients)
        name = score_key(coefficients, split, exact=exact)

        def work() -> Score | None:
            with autocast(precision, self._device):
                self.recompute_batchnorm(name)
                return self._pass(split, what, threshold, name, workers)

        return self._with_memory(work)

    def _pass(self, split: Split, what: str, threshold: float | None, key: str, workers: Workers) -> Score | None:
        partial = self._partial(key)
        return resumed(partial, lambda: self._scorer.score(self.model, split, what, partial, threshold, workers))

    def _partial(self, key: str) -> PassProgress:
        """Return the progress of an interrupted run; passes divided among ranks start over."""
        return (
            PassProgress()
            if self._log is None or not key or self._workers.world_size > 1
            else self._log.pass_progress(key)
        )

    def _scored_exactly(self, coefficients: Coefficients) -> bool:
        """Return whether `score` is exact: a single checkpoint is read from its file at no extra cost."""
        return (len(coefficients.selected) == 1 or self.candidates.exact) and self._precision == OWN

    def _mix(self, coefficients: Coefficients, *, exact: bool) -> None:
        """Load the mixture into the model: from the files if ``exact``, else from the candidate matrix."""
        # a row that is not finite makes every product with the matrix non-finite, even with a coefficient of 0
        if (exact and not self.candidates.exact) or any(checkpoint.allow_nonfinite for checkpoint in self.checkpoints):
            specs = output_specs(self.checkpoints[0])
            parts = weighted_average(self.checkpoints, coefficients, specs, only=self.candidates.ranges)
            self.candidates.assign(specs, parts)
        else:
            if not (coefficients.uniform_subset and self.candidates.average(coefficients.selected)):
                self.candidates.materialize(self.uniform().new_tensor(coefficients.values), coefficients.groups)
            self.candidates.take_integers(coefficients.selected[-1])

    def _with_memory(self, work: Callable[[], _T]) -> _T:
        """Run ``work``; on out-of-memory, halve the batches and retry, as long as the task can halve them."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                # with several ranks, one rank cannot halve its batches alone
                if not (is_out_of_memory(error) and self._workers.world_size == 1 and self.task.halve()):
                    raise
            if self._log is not None:
                self._log.keep_halving()
            self._loader.restart(halved=True)
            torch.cuda.empty_cache()

    def _describe(self, coefficients: Coefficients) -> str:
        chosen = [self.checkpoints[i] for i in coefficients.selected]
        if len(chosen) == 1:
            return f"candidate {chosen[0].path}"
        return "the mixture of steps " + ", ".join(str(checkpoint.step) for checkpoint in chosen)


def _output_key(coefficients: Coefficients, split: Split) -> str:
    """Return the journal key of a score of the output file, whose dtype may differ from the candidates'."""
    return f"written {score_key(coefficients, split, exact=True)}"
