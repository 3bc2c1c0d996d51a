"""The real objective: candidates × task. It remembers scores and counts what the search costs.

Shape suffixes: N = candidates, G = groups of tensors.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from ckptavg import batches, batchnorm
from ckptavg.average import output_specs, weighted_average
from ckptavg.candidates import Candidates, ReadInto, budget
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.errors import TaskError, UsageError
from ckptavg.meter import SECONDS, Meter
from ckptavg.objective import Cost, Score, Split
from ckptavg.options import BITS
from ckptavg.readers import StoredTensor
from ckptavg.tally import Tally
from ckptavg.tasks import Task
from ckptavg.tasks.held_out import HeldOut

_LOOK_EVERY: Final = 0.1  # seconds between looks at figures that lie on the device
Watch = Callable[[str, int, int, Mapping[str, float]], None]


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
    ) -> None:
        self.task = task
        self._seed = seed
        self.checkpoints = checkpoints
        self._device = device
        self._asked_bits: int | Literal["auto"] = bits
        self.group_size = group_size
        self.watch = watch
        self._looked = 0.0
        self.scored_on: Split = "val" if task.has("val") else "train"
        self.splits: tuple[Split, ...] = (self.scored_on, "test") if task.has("test") else (self.scored_on,)
        self.batchnorm_from: Split = "train" if task.has("train") else self.scored_on
        self._halves = HeldOut(task, self.scored_on, rest="fit", to="held", fraction=0.5, seed=seed)
        self._scores: dict[tuple[Coefficients, Split, bool], Score] = {}
        self._epoch: dict[Split, int] = {}  # examples of the last pass
        self._examples: dict[Split, int] = {}  # of a scored pass, which leaves none out
        self._lengths: dict[Split, int] = {}
        self.meter = Meter()
        self.restart()

    def restart(self) -> None:
        """Begin as a new search would, with the seed's random numbers, the first batch and nothing spent.

        What is loaded stays, and scores are still remembered; `cost` charges for them as if they were measured anew.
        """
        self.generator = torch.Generator().manual_seed(self._seed)
        self._streams: dict[Split, Iterator[Any]] = {}
        self._batch: Any = None
        self.meter.restart()

    @cached_property
    def candidates(self) -> Candidates:
        """The candidate matrix and the model; loaded when first needed, after a strategy has checked its settings."""
        torch.manual_seed(self._seed)
        model = self.task.model().to(self._device).eval()
        return Candidates(model, self.checkpoints, self.progress, bits=self._bits(model), group_size=self.group_size)

    def _bits(self, model: nn.Module) -> int:
        if self._asked_bits != "auto":
            return self._asked_bits
        return budget.largest(model.state_dict().values(), self.n, self.group_size, self._device, BITS)

    @property
    def model(self) -> nn.Module:
        """The model, on the device."""
        return self.candidates.model

    @cached_property
    def _norms(self) -> Collection[batchnorm.Layer]:
        return list(batchnorm.layers(self.model).values())

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
        """See `Objective.batches`; read once and counted where the loader does not know."""
        if on not in self._lengths:
            known = self._data(on).length(on)
            self._lengths[on] = sum(1 for _ in self._learnable(on)) if known is None else known
        return self._lengths[on]

    def blocks(self, size: int | None) -> Groups:
        """See `Objective.blocks`."""
        return self.candidates.blocks(size)

    def distances(self, groups: Groups) -> Tensor:
        """See `Objective.distances`."""
        return self.candidates.distances(groups).to(self.uniform().dtype)

    def loss(self, c_N: Tensor, on: Split | None = None, *, groups: Groups = EVERYTHING, again: bool = False) -> Tensor:
        """See `Objective.loss`; forward and backward run at once, so no graph outlives the call."""
        split = on or self.scored_on
        if split not in self._streams:
            self._streams[split] = self._endless(split)
        if not again:
            self._batch = next(self._streams[split])
        return _MixtureLoss.apply(c_N, self, self._batch, groups)  # pyright: ignore

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """See `Objective.score`."""
        return self._full(coefficients, on or self.scored_on, exact=self.candidates.exact)

    def exact_score(self, coefficients: Coefficients, on: Split) -> Score:
        """The score of the exact average of the files, where the candidate matrix is not exact."""
        return self._full(coefficients, on, exact=True)

    def score_above(self, coefficients: Coefficients, bar: float, *, strict: bool) -> Score | None:
        """See `Objective.score_above`."""
        if self.task.metric is None or self.task.metric_bounds is None:
            raise UsageError(
                "a score can only be stopped early where the metric is bounded",
                path=self.task.source,
                hint="say how in the task file, for an accuracy: metric_bounds = (0.0, 1.0)",
            )
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

    def recompute_batchnorm(self) -> None:
        """Recompute BatchNorm's statistics at the model's present weights, on training data where there is some."""

        def forward() -> None:
            for batch in self._passed(self.batchnorm_from, self._learnable(self.batchnorm_from)):
                self.task.loss(self.model, batch)

        torch.manual_seed(self._seed)
        batchnorm.recompute(self._norms, forward)

    def evaluate(self, split: Split, what: str) -> Score:
        """The score of the model's present state on one split; ``what`` names it in an error."""
        score = self._evaluate(split, what)
        assert score is not None  # only a bar makes it stop
        return score

    def cost(self) -> Cost:
        """What has been spent since the start, or the last `restart`."""
        size = self._epoch.get(self.batchnorm_from) or self.task.examples(self.batchnorm_from)
        work = self.meter["forward_examples"] + 2 * self.meter["backward_examples"]
        return Cost(
            forward_batches=round(self.meter["forward_batches"]),
            backward_batches=round(self.meter["backward_batches"]),
            seconds=self.meter[SECONDS],
            epochs=work / (3 * size) if size else None,
            epochs_of=self.batchnorm_from,
        )

    def loss_and_gradient(self, c_GN: Tensor, batch: Any, groups: Groups) -> tuple[Tensor, Tensor]:
        """The loss at c on a batch, and ∂ℓ/∂c in the shape of c."""
        self.candidates.materialize(c_GN, groups)
        self.candidates.zero_gradient()
        self.meter.count("forward", batches.size(batch))
        with torch.enable_grad(), batchnorm.batch_statistics(self._norms):
            loss = self.task.loss(self.model, batch).mean()
            loss.backward()
        self.meter.count("backward", batches.size(batch))
        return loss.detach().to(c_GN.dtype), self.candidates.pullback(groups).view(c_GN.shape)

    def _full(self, coefficients: Coefficients, split: Split, *, exact: bool) -> Score:
        score = self._remembered(coefficients, split, exact=exact)
        assert score is not None  # only a bar makes it stop
        return score

    def _remembered(
        self, coefficients: Coefficients, split: Split, *, exact: bool, bar: float | None = None
    ) -> Score | None:
        """The score; None (which is not remembered) where it cannot reach the bar."""
        key = (coefficients, split, exact)
        if key in self._scores:
            self.meter.charge(key)
            return self._scores[key]
        with self.meter.pricing(key):
            if exact and not self.candidates.exact:
                specs = output_specs(self.checkpoints[0])
                for name, offset, data in weighted_average(self.checkpoints, coefficients, specs):
                    self.candidates.assign(specs[name], name, offset, data)
            else:
                self.candidates.materialize(self.uniform().new_tensor(coefficients.values), coefficients.groups)
                self.candidates.take_integers(coefficients.selected[-1])
            self.recompute_batchnorm()
            score = self._evaluate(split, self._describe(coefficients), bar)
        if score is not None:
            self._scores[key] = score
        return score

    def _evaluate(self, split: Split, what: str, bar: float | None = None) -> Score | None:
        """The score, or None as soon as it is known to stay below the bar."""
        tally = Tally(-1.0 if self.task.metric_goal == "min" else 1.0, self.task.metric_bounds)
        metric = self.task.metric
        torch.manual_seed(self._seed)
        total = self._examples.get(split)
        with torch.no_grad():
            for batch in self._passed(split, self._data(split).batches(split)):
                tally.add(
                    self.task.loss(self.model, batch),
                    None if metric is None else metric(self.model, batch),
                    batches.size(batch),
                )
                if bar is not None and total is not None and tally.hopeless(bar, total):
                    return None
        self._examples[split] = tally.examples
        if tally.examples == 0:
            raise self._no_batches(split)
        return tally.score(what, split)

    def _data(self, split: Split) -> Task:
        return self._halves if split in ("fit", "held") else self.task

    def _passed(self, split: Split, source: Iterator[Any]) -> Iterator[Any]:
        """One pass over a split, batches moved to the device, each counted as gone forward."""
        seen = 0
        for batch in source:
            seen += batches.size(batch)
            self.meter.count("forward", batches.size(batch))
            yield batches.to_device(batch, self._device)
        self._epoch[split] = seen

    def _learnable(self, split: Split) -> Iterator[Any]:
        """One pass over a split; what is left of a divided batch may be one example, which has no statistics."""
        data = self._data(split)
        divided = isinstance(data, HeldOut)
        return (b for b in data.batches(split) if not (divided and self._norms and batches.size(b) == 1))

    def _endless(self, split: Split) -> Iterator[Any]:
        for pass_number in itertools.count():
            torch.manual_seed(self._seed + pass_number)
            batch = None
            for batch in self._learnable(split):
                yield batches.to_device(batch, self._device)
            if batch is None:
                raise self._no_batches(split)

    def _no_batches(self, split: Split) -> TaskError:
        return TaskError(f"{split}_dataloader() gave no batches", path=self.task.source)

    def _describe(self, coefficients: Coefficients) -> str:
        chosen = [self.checkpoints[i] for i in coefficients.selected]
        if len(chosen) == 1:
            return f"candidate {chosen[0].path}"
        return "the mixture of steps " + ", ".join(str(checkpoint.step) for checkpoint in chosen)


class _MixtureLoss(torch.autograd.Function):
    """ℓ(Pᵀc) with the gradient P·∂ℓ/∂w, computed in the forward call because the model's state is shared."""

    @staticmethod
    def forward(ctx: Any, c_GN: Tensor, mixture: Mixture, batch: Any, groups: Groups) -> Tensor:
        loss, gradient_GN = mixture.loss_and_gradient(c_GN, batch, groups)
        ctx.save_for_backward(gradient_GN)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_GN,) = ctx.saved_tensors
        return upstream[0] * gradient_GN, None, None, None
