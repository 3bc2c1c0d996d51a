"""The real objective: candidates × task. It remembers scores and counts what the search costs.

Shape suffixes: N = candidates, B = examples.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn

from ckptavg import batchnorm
from ckptavg.candidates import Candidates, ReadInto
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.errors import TaskError
from ckptavg.objective import Cost, Score, Split
from ckptavg.readers import StoredTensor
from ckptavg.tasks import Task

_LOOK_EVERY: Final = 0.1  # seconds between looks at figures that lie on the device
Watch = Callable[[str, int, int, Mapping[str, float]], None]


class Mixture:
    """Loss and score of a mixture of checkpoints on a task; see `ckptavg.objective.Objective`.

    Args:
        task: model, data, loss and metric.
        checkpoints: the N candidates, in training order.
        device: where the model and the candidates live.
        seed: of everything random; loaders are started with seeds derived from it, so shuffling repeats.
        watch: is told the progress, a few times a second.
    """

    def __init__(
        self,
        task: Task,
        checkpoints: Sequence[Checkpoint],
        *,
        device: torch.device,
        seed: int = 0,
        watch: Watch | None = None,
    ) -> None:
        self._task = task
        self._seed = seed
        self._checkpoints = checkpoints
        self._watch = watch
        self._looked = 0.0
        self._started = time.perf_counter()
        self._batches_done: Counter[str] = Counter()
        self._examples_done: Counter[str] = Counter()
        self._device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.scored_on: Split = "val" if task.has("val") else "train"
        self.splits: tuple[Split, ...] = (self.scored_on, "test") if task.has("test") else (self.scored_on,)
        self.batchnorm_from: Split = "train" if task.has("train") else self.scored_on
        self._scores: dict[tuple[Coefficients, Split], Score] = {}
        self._streams: dict[Split, Iterator[Any]] = {}
        self._examples: dict[Split, int] = {}

    @cached_property
    def candidates(self) -> Candidates:
        """The candidate matrix and the model; loaded when first needed, after a strategy has checked its settings."""
        torch.manual_seed(self._seed)
        return Candidates(self._task.model().to(self._device).eval(), self._checkpoints, self.progress)

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
        return len(self._checkpoints)

    def step(self, i: int) -> int:
        """The training step of candidate ``i``."""
        return self._checkpoints[i].step

    def uniform(self) -> Tensor:
        """See `Objective.uniform`."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64  # mps has no float64
        return torch.full((self.n,), 1 / self.n, dtype=dtype, device=self._device)

    def loss(self, c_N: Tensor, on: Split | None = None) -> Tensor:
        """See `Objective.loss`; forward and backward run at once, so no graph outlives the call."""
        split = on or self.scored_on
        if split not in self._streams:
            self._streams[split] = self._endless(split)
        return _MixtureLoss.apply(c_N, self, next(self._streams[split]))  # pyright: ignore

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """See `Objective.score`."""
        key = (coefficients, on or self.scored_on)
        if key not in self._scores:
            c_N = self.uniform().new_tensor(coefficients.values[0])
            self.candidates.materialize(c_N)
            self.candidates.take_integers(coefficients.selected[-1])
            self.recompute_batchnorm()
            self._scores[key] = self.evaluate(key[1], what=self._describe(coefficients))
        return self._scores[key]

    def progress(self, stage: str, done: int, total: int, **figures: Tensor | float) -> None:
        """See `Objective.progress`."""
        now = time.perf_counter()
        if self._watch and (done == total or now - self._looked > _LOOK_EVERY):
            self._looked = now
            self._watch(stage, done, total, {name: float(value) for name, value in figures.items()})

    def load(self, specs: Mapping[str, StoredTensor], read_into: ReadInto) -> None:
        """Put the weights of a file into the model."""
        self.candidates.load(specs, read_into)

    def recompute_batchnorm(self) -> None:
        """Recompute BatchNorm's statistics at the model's present weights, on training data where there is some."""

        def forward() -> None:
            for batch in self._batches(self.batchnorm_from):
                self._task.loss(self.model, batch)

        batchnorm.recompute(self._norms, forward)

    def evaluate(self, split: Split, what: str) -> Score:
        """The score of the model's present state on one split; ``what`` names it in an error."""
        totals = torch.zeros(2, dtype=self.uniform().dtype, device=self._device)
        examples = 0
        metric = self._task.metric
        with torch.no_grad():
            for batch in self._batches(split):
                count = batch_size(batch)
                totals[0] += _sum(self._task.loss(self.model, batch), count, "loss")
                if metric is not None:
                    totals[1] += _sum(metric(self.model, batch), count, "metric")
                examples += count
        if examples == 0:
            raise TaskError(f"{split}_dataloader() gave no batches")
        loss, mean = (totals / examples).tolist()
        sign = -1.0 if self._task.metric_goal == "min" else 1.0
        score = Score(
            value=-loss if metric is None else sign * mean,
            loss=loss,
            metric=None if metric is None else mean,
            examples=examples,
        )
        if not all(abs(number) < float("inf") for number in (score.value, score.loss)):  # NaN fails too
            raise TaskError(
                f"{what} has loss {loss}" + ("" if metric is None else f" and metric {mean}") + f" on the {split} data",
                hint="leave a broken candidate out with --exclude; `ckptavg inspect` lists them",
            )
        return score

    def cost(self) -> Cost:
        """What has been spent since the start."""
        return Cost(
            forward_batches=self._batches_done["forward"],
            backward_batches=self._batches_done["backward"],
            seconds=time.perf_counter() - self._started,
            epochs=self._epochs(),
            epochs_of=self.batchnorm_from,
        )

    def _epochs(self) -> float | None:
        """The work in passes over the training data, a backward counted as two forwards."""
        size = self._examples.get(self.batchnorm_from) or self._task.examples(self.batchnorm_from)
        work = self._examples_done["forward"] + 2 * self._examples_done["backward"]
        return work / (3 * size) if size else None

    def _batches(self, split: Split, pass_number: int = 0) -> Iterator[Any]:
        """One pass over a split, batches on the device, random numbers as in any pass of the same number."""
        torch.manual_seed(self._seed + pass_number)
        seen = 0
        for batch in self._task.batches(split):
            moved = to_device(batch, self._device)
            size = batch_size(moved)
            self._count("forward", size)
            seen += size
            yield moved
        self._examples[split] = seen

    def _endless(self, split: Split) -> Iterator[Any]:
        pass_number = 0
        while True:
            batch = None
            for batch in self._batches(split, pass_number):
                yield batch
            if batch is None:
                raise TaskError(f"{split}_dataloader() gave no batches")
            pass_number += 1

    def _count(self, direction: str, examples: int) -> None:
        self._batches_done[direction] += 1
        self._examples_done[direction] += examples

    def loss_and_gradient(self, c_N: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss at c on a batch, and ∂ℓ/∂c [N]."""
        self.candidates.materialize(c_N)
        self.candidates.zero_gradient()
        with torch.enable_grad(), batchnorm.batch_statistics(self._norms):
            loss = self._task.loss(self.model, batch).mean()
            loss.backward()
        self._count("backward", batch_size(batch))
        return loss.detach().to(c_N.dtype), self.candidates.pullback()

    def _describe(self, coefficients: Coefficients) -> str:
        chosen = [self._checkpoints[i] for i in coefficients.selected]
        if len(chosen) == 1:
            return f"candidate {chosen[0].path}"
        return "the mixture of steps " + ", ".join(str(checkpoint.step) for checkpoint in chosen)


class _MixtureLoss(torch.autograd.Function):
    """ℓ(Pᵀc) with the gradient P·∂ℓ/∂w, computed in the forward call because the model's state is shared."""

    @staticmethod
    def forward(ctx: Any, c_N: Tensor, mixture: Mixture, batch: Any) -> Tensor:
        loss, gradient_N = mixture.loss_and_gradient(c_N, batch)
        ctx.save_for_backward(gradient_N)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient_N,) = ctx.saved_tensors
        return upstream[0] * gradient_N, None, None


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` (any nesting of tensors) with every tensor on ``device``; anything else is passed on as it is."""
    if isinstance(batch, Mapping) and not hasattr(batch, "to"):
        return type(batch)({key: to_device(value, device) for key, value in batch.items()})  # pyright: ignore
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))  # pyright: ignore
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)  # pyright: ignore
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    move = getattr(batch, "to", None)
    return batch if move is None else move(device)


def batch_size(batch: Any) -> int:
    """The number of examples of a batch: the first dimension of the first tensor in it, 1 if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((batch_size(part) for part in parts if _has_tensor(part)), 1)


def _has_tensor(part: Any) -> bool:
    if isinstance(part, Mapping | list | tuple):
        return any(_has_tensor(inner) for inner in (part.values() if isinstance(part, Mapping) else part))
    return isinstance(part, Tensor)


def _sum(value: Any, count: int, function: str) -> Tensor:
    """The sum over a batch of what the task gave: a mean over its examples, or one value for each."""
    if isinstance(value, bool | int | float):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor) or value.is_complex() or value.numel() not in (1, count):
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TaskError(f"{function} must give a scalar or one real number an example [{count}], not {got}")
    return value.sum(dtype=torch.float64 if value.device.type != "mps" else torch.float32) * (count / value.numel())
