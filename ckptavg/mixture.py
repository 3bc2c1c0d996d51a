"""The real objective: candidates × task. It remembers scores and counts what the search costs.

Shape suffixes: N = candidates, G = groups of tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor, nn

from ckptavg import batchnorm, curvature
from ckptavg.average import output_specs, weighted_average
from ckptavg.candidates import Candidates, ReadInto, budget
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.errors import is_out_of_memory
from ckptavg.evaluator import Watch
from ckptavg.feed import Feed, Stream
from ckptavg.gradient import MixtureLoss, loss_and_gradient
from ckptavg.meter import SECONDS, Meter
from ckptavg.objective import Cost, Hessian, Score, Split
from ckptavg.options import BITS
from ckptavg.partial import Partial, resumed
from ckptavg.readers import StoredTensor
from ckptavg.replay import Replay, score_key
from ckptavg.result import MatrixResult
from ckptavg.scorer import Scorer
from ckptavg.surrogate import Surrogate
from ckptavg.tasks import Task

_T = TypeVar("_T")
_LOOK_EVERY: Final = 0.1  # seconds between looks at figures that lie on the device


class Mixture:
    """Loss and score of a mixture of checkpoints on a task; see `ckptavg.objective.Objective`.

    Args:
        task: model, data, loss and metric.
        checkpoints: the N candidates, in training order.
        device: where the model and the candidates live.
        seed: of everything random; loaders are started with seeds derived from it, so shuffling repeats.
        bits: of an element of the candidate matrix; ``auto`` is the most that fits the device.
        group_size: elements that share a scale and a zero point where ``bits`` < 32.
        watch: is told the progress, a few times a second.
        replay: knows what an interrupted run of the same command has measured.
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
        watch: Watch | None = None,
        replay: Replay | None = None,
    ) -> None:
        self.task = task
        self._seed = seed
        self.checkpoints = checkpoints
        self._device = device
        self._asked_bits: int | Literal["auto"] = bits
        self.group_size = group_size
        self.watch = watch
        self._replay = replay
        self._looked = 0.0
        self.scored_on: Split = "val" if task.has("val") else "train"
        self.splits: tuple[Split, ...] = (self.scored_on, "test") if task.has("test") else (self.scored_on,)
        self.batchnorm_from: Split = "train" if task.has("train") else self.scored_on
        self._scores: dict[tuple[Coefficients, Split, bool], Score] = {}
        self._surrogates: dict[tuple[Split, Hessian], Surrogate] = {}
        self.meter = Meter()
        for _ in range(0 if replay is None else replay.halvings):
            task.halve()  # as it had to be before; then results are the same
        self._feed = Feed(task, self.scored_on, device, seed, self.meter)
        self._scorer = Scorer(task, self._feed)
        self.restart()

    def restart(self) -> None:
        """Begin as a new search would, with the seed's random numbers, the first batch and nothing spent.

        What is loaded stays, and scores are still remembered; `cost` charges for them as if they were measured anew.
        """
        self.generator = torch.Generator().manual_seed(self._seed)
        self._feed.restart()
        if self._replay is not None:
            self._replay.restart()
        self.meter.restart()

    @cached_property
    def candidates(self) -> Candidates:
        """The candidate matrix and the model; loaded when first needed, after a strategy has checked its settings."""
        torch.manual_seed(self._seed)
        model = self.task.model().to(self._device).eval()
        bits, size = self._bits(model), self.group_size
        found = Candidates(model, self.checkpoints, self.progress, bits=bits, group_size=size)
        for checkpoint in self.checkpoints:
            checkpoint.check_unchanged()  # not only at the end of a long search
        return found

    def _bits(self, model: nn.Module) -> int:
        if self._asked_bits != "auto":
            return self._asked_bits
        floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        elements, size = sum(tensor.numel() for tensor in floats), sum(tensor.nbytes for tensor in floats)
        return budget.largest(elements, size, self.n, self.group_size, self._device, BITS)

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
        found = self.candidates
        return MatrixResult(
            bits=found.bits,
            group_size=None if found.exact else self.group_size,
            bytes=found.nbytes,
            error=found.error,
        )

    def prepare(self) -> None:
        """See `Evaluator.prepare`."""
        self.candidates  # noqa: B018  # made when first asked for

    @property
    def model(self) -> nn.Module:
        """The model, on the device."""
        return self.candidates.model

    @cached_property
    def _norms(self) -> Collection[batchnorm.Layer]:
        found = list(batchnorm.layers(self.model).values())
        self._feed.needs_two = bool(found)
        return found

    @property
    def n(self) -> int:
        """The number of candidates."""
        return len(self.checkpoints)

    def step(self, i: int) -> int:
        """The training step of candidate ``i``."""
        return self.checkpoints[i].step

    def uniform(self) -> Tensor:
        """See `Objective.uniform`."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64  # mps has no float64
        return torch.full((self.n,), 1 / self.n, dtype=dtype, device=self._device)

    def batches(self, on: Split) -> int:
        """See `Objective.batches`."""
        return self._feed.length(on)

    def blocks(self, size: int | None) -> Groups:
        """See `Objective.blocks`."""
        return self.candidates.blocks(size)

    def distances(self, groups: Groups) -> Tensor:
        """See `Objective.distances`."""
        return self.candidates.distances(groups).to(self.uniform().dtype)

    def loss(self, c_N: Tensor, on: Split | None = None, *, groups: Groups = EVERYTHING, again: bool = False) -> Tensor:
        """See `Objective.loss`; forward and backward run at once, so no graph outlives the call."""
        fresh = not again

        def work() -> Tensor:
            nonlocal fresh
            if self._replay is not None and self._replay.halved():
                self._feed.restart(halved=True)
                fresh = True
            stream = self._feed.stream(on or self.scored_on)
            if fresh:
                stream.advance()
            fresh = True  # the batch that was too large is gone
            return MixtureLoss.apply(c_N, self._step(stream, groups))  # pyright: ignore

        return self._with_memory(work)

    def surrogate(self, on: Split | None = None, hessian: Hessian = "auto") -> Surrogate:
        """See `Objective.surrogate`; remembered."""
        key = (on or self.scored_on, hessian)
        if key in self._surrogates:
            self.meter.charge(key)
            return self._surrogates[key]
        norms, split, name = self._norms, key[0], f"surrogate {' '.join(key)}"
        if self._replay is not None and (known := self._replay.surrogate(name)):
            self._surrogates[key] = known
            return known

        def passed() -> Iterator[Any]:
            for done, batch in enumerate(self._feed.learnable(split), 1):
                yield batch
                self.progress("measuring the curvature", done, self.batches(split))

        def work() -> Surrogate:
            with batchnorm.batch_statistics(norms):
                return curvature.surrogate(
                    self.candidates, passed, self.task.loss,
                    hessian=hessian, count=self.meter.count, source=self.task.source,
                    order=lambda: self._feed.order[split], partial=lambda kind: self._partial(f"{name} {kind}"),
                )  # fmt: skip

        with self.meter.pricing(key):
            self._surrogates[key] = self._with_memory(work)
        if self._replay is not None:
            self._replay.keep_surrogate(name, self._surrogates[key])
        return self._surrogates[key]

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """See `Objective.score`."""
        alone = len(coefficients.selected) == 1  # one file: what it really is costs no more than what is left of it
        return self._full(coefficients, on or self.scored_on, exact=alone or self.candidates.exact)

    def exact_score(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.exact_score`; scored again only where the candidate matrix is not exact."""
        return self._full(coefficients, split, exact=True)

    def score_above(self, coefficients: Coefficients, bar: float, *, strict: bool) -> Score | None:
        """See `Objective.score_above`."""
        score = self._remembered(coefficients, self.scored_on, exact=self.candidates.exact, bar=bar)
        return score if score and (score.value > bar if strict else score.value >= bar) else None

    def progress(self, stage: str, done: int, total: int, **figures: Tensor | float) -> None:
        """See `Objective.progress`."""
        now = time.perf_counter()
        if self.watch and (done == total or now - self._looked > _LOOK_EVERY):
            self._looked = now
            self.watch(stage, done, total, {name: float(value) for name, value in figures.items()})

    def load(self, specs: Mapping[str, StoredTensor], read_into: ReadInto) -> None:
        """Put the weights of a file into the model."""
        self.candidates.load(specs, read_into)

    @property
    def statistics(self) -> Collection[str]:
        """See `Evaluator.statistics`."""
        return batchnorm.statistics(self.model)

    def adopt(
        self, coefficients: Coefficients, specs: Mapping[str, StoredTensor], read_into: ReadInto
    ) -> Mapping[str, Tensor]:
        """See `Evaluator.adopt`."""
        self.load(specs, read_into)
        self._with_memory(lambda: self.recompute_batchnorm(_written(coefficients, self.batchnorm_from)))
        state = self.model.state_dict()
        return {name: state[name] for name in self.statistics}

    def score_adopted(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.score_adopted`."""
        key = _written(coefficients, split)
        score = None if self._replay is None else self._replay.score(key, self.task)
        if score is None:
            score = self._with_memory(lambda: self.evaluate(split, "the average", key))
            if self._replay is not None:
                self._replay.keep_score(key, score)
        return score

    def recompute_batchnorm(self, key: str) -> None:
        """Recompute BatchNorm's statistics at the model's present weights, on training data where there is some.

        Args:
            key: of these weights in the journal.
        """
        norms, split, partial = self._norms, self.batchnorm_from, self._partial(f"{key} batchnorm")

        def forward() -> None:
            passed, order = self._feed.learnable(split), lambda: self._feed.order[split]
            for batch in partial.rest(passed, order, lambda: batchnorm.statistics_of(norms), whole=True):
                self.task.loss(self.model, batch)

        resumed(partial, lambda: batchnorm.recompute(norms, forward, next(reversed(partial.states), None)))

    def evaluate(self, split: Split, what: str, key: str = "") -> Score:
        """The score of the model's present state on one split.

        Args:
            split: which.
            what: names the model in an error.
            key: of these weights and the split in the journal.
        """
        score = self._measured(split, what, None, key)
        assert score is not None  # only a bar makes it stop
        return score

    def cost(self) -> Cost:
        """What has been spent since the start, or the last `restart`."""
        size = self._feed.examples.get(self.batchnorm_from) or self.task.examples(self.batchnorm_from)
        work = self.meter["forward_examples"] + 2 * self.meter["backward_examples"]
        return Cost(
            forward_batches=round(self.meter["forward_batches"]),
            backward_batches=round(self.meter["backward_batches"]),
            evaluations=round(self.meter["evaluations"]),
            seconds=self.meter[SECONDS],
            epochs=work / (3 * size) if size else None,
            epochs_of=self.batchnorm_from,
        )

    def _step(self, stream: Stream, groups: Groups) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def measured(c_GN: Tensor) -> tuple[Tensor, Tensor]:
            candidates, norms = self.candidates, self._norms  # loading them draws random numbers, fetching seeds
            return loss_and_gradient(self.task, candidates, norms, self.meter, c_GN, stream.batch, groups)

        def replayed(c_GN: Tensor) -> tuple[Tensor, Tensor]:
            assert self._replay is not None
            key, known = self._replay.loss(c_GN)
            if known is None:
                known = measured(c_GN)
                self._replay.keep_loss(key, c_GN, *known)
            return known

        return measured if self._replay is None else replayed

    def _full(self, coefficients: Coefficients, split: Split, *, exact: bool) -> Score:
        score = self._remembered(coefficients, split, exact=exact)
        assert score is not None  # only a bar makes it stop
        return score

    def _remembered(
        self, coefficients: Coefficients, split: Split, *, exact: bool, bar: float | None = None
    ) -> Score | None:
        """The score; None (which is not remembered) where it cannot reach the bar."""
        key = (coefficients, split, exact)
        if key in self._scores and (bar is None or self.meter.charged(key)):
            self.meter.charge(key)
            return self._scores[key]
        name = score_key(coefficients, split, exact=exact)
        if self._replay is not None:
            # what this run has measured itself is measured again where it is to stop early, for the price of that
            if known := self._replay.score(name, self.task, earlier=bar is not None):
                self._scores[key] = known
                return known
            if bar is not None and self._replay.rejected(name, bar):
                return None
        with self.meter.pricing(key if bar is None else (*key, bar)):
            self.meter.evaluated()
            self._mix(coefficients, exact=exact)
            score = self._with_memory(lambda: self._recomputed(split, self._describe(coefficients), bar, name))
        if score is not None:
            self._scores[key] = score
            self.meter.same_price(key if bar is None else (*key, bar), key)
        if self._replay is not None:
            if score is not None:
                self._replay.keep_score(name, score)
            elif bar is not None:
                self._replay.keep_rejected(name, bar)
        return score

    def _mix(self, coefficients: Coefficients, *, exact: bool) -> None:
        """Make the model the mixture: of the files themselves if ``exact``, else of the candidate matrix."""
        if exact and not self.candidates.exact:
            specs = output_specs(self.checkpoints[0])
            for name, offset, data in weighted_average(self.checkpoints, coefficients, specs):
                self.candidates.assign(specs[name], name, offset, data)
        else:
            self.candidates.materialize(self.uniform().new_tensor(coefficients.values), coefficients.groups)
            self.candidates.take_integers(coefficients.selected[-1])

    def _recomputed(self, split: Split, what: str, bar: float | None, key: str) -> Score | None:
        self.recompute_batchnorm(key)
        return self._measured(split, what, bar, key)

    def _measured(self, split: Split, what: str, bar: float | None, key: str) -> Score | None:
        partial = self._partial(key)
        return resumed(partial, lambda: self._scorer.score(self.model, split, what, partial, bar))

    def _partial(self, key: str) -> Partial:
        return Partial() if self._replay is None or not key else self._replay.partial(key)

    def _with_memory(self, work: Callable[[], _T]) -> _T:
        """Do ``work``, with batches half as large as long as memory runs out and the task can halve them."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not (is_out_of_memory(error) and self.task.halve()):
                    raise
            if self._replay is not None:
                self._replay.keep_halving()
            self._feed.restart(halved=True)
            torch.cuda.empty_cache()

    def _describe(self, coefficients: Coefficients) -> str:
        chosen = [self.checkpoints[i] for i in coefficients.selected]
        if len(chosen) == 1:
            return f"candidate {chosen[0].path}"
        return "the mixture of steps " + ", ".join(str(checkpoint.step) for checkpoint in chosen)


def _written(coefficients: Coefficients, split: Split) -> str:
    """The key of the file as it lies, which has the output's dtype."""
    return f"written {score_key(coefficients, split, exact=True)}"
