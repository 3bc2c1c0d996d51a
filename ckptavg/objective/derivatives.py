"""Losses of mixtures and their derivatives in the coefficients.

Shape suffixes: N = candidates, G = groups of tensors.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ckptavg.batches import data_parallel
from ckptavg.batches.loader import BatchLoader
from ckptavg.batches.stream import LocalShard
from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.cost import CostMeter
from ckptavg.errors import NotFiniteError, UsageError
from ckptavg.objective import FOLDS, Hessian, batchnorm, curvature
from ckptavg.objective.codecs import GradientCodec, SurrogateCodec
from ckptavg.objective.loss import MixtureLoss, loss_and_gradient, losses_and_gradients
from ckptavg.objective.loss_log import LossLog
from ckptavg.objective.mixed_model import MixedModel
from ckptavg.objective.outputs import Outputs, keeping, kept
from ckptavg.objective.remembered import Remembered
from ckptavg.score import Split
from ckptavg.surrogate import Surrogate
from ckptavg.tasks.batch import Batch


class Derivatives:
    """The losses of a task; see `ckptavg.objective.Losses`.

    Attributes:
        notes: remarks for the report.
    """

    def __init__(self, mixed: MixedModel, loader: BatchLoader, log: LossLog, meter: CostMeter) -> None:
        self._mixed = mixed
        self._loader = loader
        self._log = log
        self._meter = meter
        self._workers = mixed.run.workers
        self._divided: dict[Split, bool] = {}
        self._surrogates = Remembered(SurrogateCodec(), mixed.run, meter)
        self._gradients = Remembered(GradientCodec(), mixed.run, meter)
        self.notes: list[str] = []
        self.uniform = mixed.uniform
        self.batches = loader.length

    def blocks(self, size: int | None) -> Groups:
        """See `Losses.blocks`."""
        return self._mixed.candidates.blocks(size)

    def distances(self, groups: Groups) -> Tensor:
        """See `Losses.distances`."""
        return self._mixed.candidates.distances(groups).to(self.uniform().dtype)

    def loss(self, c_N: Tensor, on: Split | None = None, *, groups: Groups = EVERYTHING, again: bool = False) -> Tensor:
        """See `Losses.loss`; runs forward and backward together, so no graph outlives the call."""
        split = on or self._loader.scored_on
        if self._log.halved():
            self._loader.restart(halved=True)
        if not again:
            self._loader.stream(split, self._divides).advance()
        compute = partial(self._step, split=split, groups=groups)
        return self._loader.with_memory(lambda: MixtureLoss.apply(c_N, compute))  # pyright: ignore

    def surrogate(self, on: Split | None = None, hessian: Hessian = "auto", examples: int | None = None) -> Surrogate:
        """See `Losses.surrogate`; cached."""
        self._check_whole()
        key = (on or self._loader.scored_on, hessian, examples)
        return self._surrogates.find(key, lambda: self._loader.with_memory(partial(self._measure_surrogate, *key)))

    def gradients(
        self, coefficients: Coefficients, on: Split | None = None, folds: int = FOLDS
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Losses.gradients`; cached. Each rank runs its own batches; F·(2 + N) numbers are summed at the end."""
        self._check_whole()
        key = (coefficients, on or self._loader.scored_on, folds)
        return self._gradients.find(key, lambda: self._loader.with_memory(partial(self._measure_gradients, *key)))

    def gradient(self, coefficients: Coefficients, on: Split | None = None) -> tuple[float, Tensor]:
        """See `Losses.gradient`; cached."""
        _, value_F, gradient_FN = self.gradients(coefficients, on, 1)
        return float(value_F[0]), gradient_FN[0]

    def outputs(self, on: Split | None = None) -> Outputs:
        """See `Losses.outputs`; each rank runs its own candidates, and all of them keep all outputs."""
        self.check_any_sum()
        split = on or self._loader.scored_on

        def measure() -> Outputs:
            batches = kept(self._loader.learnable(split), self.batches(split), self._mixed.run.device)
            return Outputs(self._mixed, batches, self._meter)

        return self._loader.with_memory(measure)

    def check_any_sum(self) -> None:
        """See `Losses.check_any_sum`."""
        search, candidates = self._mixed.search, self._mixed.candidates
        if search.shard:
            raise UsageError("--constraint linear does not support --shard")
        if not candidates.exact:
            message = f"--constraint linear needs exact candidates, not {candidates.bits} bits"
            raise UsageError(message, hint="--bits 32, or --offload disk")
        recomputed = batchnorm.statistics(self._mixed.model)
        if shared := [name for name in candidates.shared if name not in recomputed]:
            names = f"{shared[0]}{f' (and {len(shared) - 1} more)' if len(shared) > 1 else ''}"
            message = f"{names} is the same in all candidates, and would be scaled by the sum of the coefficients"
            raise UsageError(f"--constraint linear: {message}", hint=f"{keeping(shared)} copies it instead")

    def _check_whole(self) -> None:
        if self._mixed.search.shard:
            raise UsageError("a sharded model has no second derivatives here", hint="--solver gumbel or gradient")

    def _step(self, c_GN: Tensor, split: Split, groups: Groups) -> tuple[Tensor, Tensor]:
        """Return the loss on the current batch of a stream, and its gradient."""
        stream = self._loader.stream(split, self._divides)
        batch = (split, stream.current(), groups)
        if recorded := self._log.find(c_GN, batch):
            return recorded
        # loading the candidates draws random numbers, so it comes before the batch, which is seeded
        self._mixed.candidates  # noqa: B018
        share = stream.share
        self._meter.running = [share.size]
        loss, gradient_GN = loss_and_gradient(self._mixed, c_GN, share, groups, self._workers)
        self._meter.count("backward", share.size)
        self._log.keep(c_GN, batch, loss, gradient_GN)
        return loss, gradient_GN

    def _measure_surrogate(self, split: Split, hessian: Hessian, examples: int | None) -> Surrogate:
        mixed, workers, norms = self._mixed, self._workers, self._mixed.norms
        counts, kinds = torch.zeros(2, 2, dtype=torch.int64), ("forward", "backward")

        def count(kind: str, examples: int) -> None:
            counts[kinds.index(kind)] += torch.tensor([1, examples])

        def batches_with_progress() -> Iterator[Batch]:
            total = self.batches(split)
            if examples is not None:
                first = next(self._loader.first(split)).size
                total = min(total, -(-examples // (first * workers.world_size)) * workers.world_size)
            for done, batch in enumerate(self._loader.learnable(split, workers), 1):
                yield batch
                mixed.run.progress("measuring the curvature", min(total, done * workers.world_size), total)
                if done * workers.world_size >= total:
                    break

        with batchnorm.batch_statistics(norms), mixed.plain():
            surrogate = curvature.surrogate(
                mixed.candidates, batches_with_progress, lambda _, batch: mixed.counted.call(mixed.task.loss, batch),
                hessian=hessian, count=count, source=mixed.task.source, workers=workers,
                at_mean=mixed.vectors.converge_at_mean,
            )  # fmt: skip
        for kind, (number, counted) in zip(kinds, workers.sum(counts).tolist(), strict=True):
            self._meter.count(kind, counted, number)
        return surrogate

    def _measure_gradients(self, coefficients: Coefficients, split: Split, folds: int) -> tuple[Tensor, Tensor, Tensor]:
        mixed, workers, parts = self._mixed, self._workers, -(-folds // self.batches(split))
        c_N = self.uniform().new_tensor(coefficients.values[0])
        sums_F, passes = c_N.new_zeros(folds, 2 + len(c_N)), c_N.new_zeros(2)
        for number, (batch, size) in enumerate(self._loader.learnable(split, workers)):
            found = losses_and_gradients(mixed, c_N, LocalShard(batch, size, 1.0), parts=parts)
            place = (number * workers.world_size + workers.rank) * len(found)
            for p, (examples, loss, gradient_N) in enumerate(found):
                row = torch.cat([torch.ones_like(loss).view(1), loss.view(1), gradient_N.flatten()])
                sums_F[(place + p) % folds] += examples * row
            passes += torch.tensor([len(found) * size, len(found)]).to(passes)
        examples, batches = workers.sum(passes).tolist()
        self._meter.count("backward", round(examples), round(batches))
        sums_F = workers.sum(sums_F).to("cpu", torch.float64)
        sums_F = sums_F[sums_F[:, 0] > 0]
        value_F, gradient_FN = sums_F[:, 1] / sums_F[:, 0], sums_F[:, 2:] / sums_F[:, :1]
        if not value_F.isfinite().all():
            bad = float(value_F[~value_F.isfinite()][0])
            message = f"the loss is {bad} on the {split} data, of {mixed.describe(coefficients)}"
            raise NotFiniteError(message, path=mixed.task.source)
        return sums_F[:, 0], value_F, gradient_FN - gradient_FN.mean(dim=1, keepdim=True)

    def _divides(self, split: Split) -> bool:
        """Return whether ranks divide the batches of this split; decided once, on its first batch."""
        if self._workers.world_size == 1:
            return False
        if split not in self._divided:
            reason = "BatchNorm needs the whole batch" if self._mixed.norms else self._obstacle(split)
            self._divided[split] = reason is None
            if reason is not None:
                self.notes.append(f"every worker ran whole batches of the {split} data, because {reason}")
        return self._divided[split]

    def _obstacle(self, split: Split) -> str | None:
        mixed, batch = self._mixed, next(self._loader.first(split), None)
        if batch is None:
            raise self._loader.empty(split)
        mixed.candidates.materialize(self.uniform())
        with mixed.plain():
            loss = partial(mixed.counted.call, mixed.task.loss)
            self._meter.running = ()  # what several ranks decide once is not charged
            return data_parallel.obstacle(loss, batch, mixed.run.device, self._workers)
