"""Outputs of each candidate, kept, and the loss of their linear combinations: for models linear in their weights.

Shape suffixes: N = candidates, U = units (examples, or batches if the loss has one value for each).
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias, TypeVar

import torch
from torch import Tensor, autograd, nn

from ckptavg.candidates.plan import free_memory, sized
from ckptavg.checkpoints.integrity import same_bytes
from ckptavg.cost import CostMeter
from ckptavg.errors import OutOfMemoryError, TaskError, UsageError
from ckptavg.objective.curvature.directions import UnavailableError, derivatives
from ckptavg.objective.curvature.model_call import detach_outputs, replaced, tensors
from ckptavg.objective.mixed_model import MixedModel
from ckptavg.objective.output_losses import STAGE, Expansion
from ckptavg.readers import FLOATING
from ckptavg.score import sign
from ckptavg.tasks.batch import Batch, copied, leaves

Stacked: TypeAlias = Sequence[Tensor]  # the outputs of a batch that the loss uses, each [N, ...]
_SUMS: Final = (0.5, 2.0)  # of the coefficients of the mixtures that are checked
_SHARE: Final = 0.7  # fraction of free memory that the data, and then the outputs, may use
_HINT: Final = "--constraint affine, or --force-linear to train the coefficients by gradients all the same"
_T = TypeVar("_T")


class Outputs:
    """The losses of a task at linear combinations of outputs; see `ckptavg.objective.output_losses.OutputLosses`.

    The loss is given a model that returns Σ_i c_i z_i when it is called. So any loss will do, and its derivatives in c
    are those of autograd from the output on. Outputs are float64, or of the model's dtype where the loss takes no
    other. The first batch is also run through the model at two mixtures, with coefficients that sum to 0.5 and to 2:
    output and loss must agree with those of the combination within √eps of the model's dtype.

    Args:
        mixed: the model and the candidates, which the ranks divide among them.
        batches: those of a pass, on the device; they are kept.
        meter: counts the passes.
    Raises:
        UsageError: if the model is not linear in its weights.
        TaskError: if the loss is not a function of the output with second derivatives, or an output is not finite.
        OutOfMemoryError: if the outputs do not fit in memory.
    """

    def __init__(self, mixed: MixedModel, batches: Sequence[Batch], meter: CostMeter) -> None:
        if mixed.norms:
            name = next(iter(mixed.norms))
            raise UsageError(f"--constraint linear: with BatchNorm ({name}) {_NONLINEAR}", hint=_HINT)
        self._mixed, self._batches, self._meter = mixed, batches, meter
        self._task, self._n = mixed.task, len(mixed.checkpoints)
        self._templates: dict[int, Any] = {}  # batch → an output, for its structure
        self._done = 0  # batches of this rank, for the progress
        with mixed.plain():
            self._places = self._used_places()
            first = self._stacked(range(1), range(self._n))
            examples = sum(batch.size for batch in batches)
            needed = 8 * sum(z.numel() for z in first[0]) * examples // batches[0].size
            _check_memory(needed, f"the outputs of {self._n} candidates", mixed.run.device)
            self._dtype = self._dtype_of_loss(first[0])
            self._check_linear([z.to(self._dtype) for z in first[0]])
            stacked = [*first, *self._divided(range(1, len(batches)))]
        self._outputs = [[z.to(self._dtype) for z in outputs] for outputs in stacked]
        if not all(bool(z.isfinite().all()) for outputs in self._outputs for z in outputs):
            raise TaskError("an output of the model is NaN or infinite", path=self._task.source)
        c_N = mixed.uniform()
        losses = [self._expanded(number, outputs, c_N)[0] for number, outputs in enumerate(self._outputs)]
        self.eps = torch.finfo(losses[0].dtype).eps
        self._units = list(map(len, losses))
        sizes = [batch.size / units for batch, units in zip(batches, self._units, strict=True) for _ in range(units)]
        self.examples_U = torch.tensor(sizes, dtype=torch.float64)

    def expand(self, c_N: Tensor, weight_U: Tensor) -> Expansion:
        """See `OutputLosses.expand`."""
        c_N = c_N.to(self._mixed.uniform())
        losses: list[Tensor] = []
        total = c_N.new_zeros(1 + self._n, self._n)
        for number, weights in enumerate(weight_U.to(c_N).split(self._units)):
            each, derivatives_NN = self._expanded(number, self._outputs[number], c_N, weights)
            losses.append(each)
            total += derivatives_NN
        total = total.to("cpu", torch.float64) / weight_U.sum()
        return Expansion(torch.cat(losses).to("cpu", torch.float64), total[0], total[1:])

    def metric(self, c_N: Tensor) -> Tensor | None:
        """See `OutputLosses.metric`."""
        task, values = self._task, list[Tensor]()
        for number, outputs in enumerate(self._outputs if task.metric else ()):
            assert task.metric is not None
            with torch.no_grad():
                value = self._apply(task.metric, number, _combined(outputs, c_N))
            named = value if isinstance(value, Mapping) else {"": value}
            name = task.metric_key or next(iter(named))
            value = named.get(name)
            if value is None or torch.as_tensor(value).numel() != self._units[number]:
                return None
            values.append(sign(task.metric_goal, name) * torch.as_tensor(value).flatten())
        return torch.cat(values).to("cpu", torch.float64) if values else None

    def _used_places(self) -> list[int]:
        """Return the places of the outputs that the loss of the first batch depends on."""
        self._mixed.candidates.materialize(self._mixed.uniform())
        weights = [weight for weight in self._mixed.model.parameters() if weight.requires_grad]
        with torch.enable_grad(), detach_outputs(self._mixed.model) as call:
            loss = self._loss(0).mean()
        try:
            if not loss.requires_grad:
                raise UnavailableError("it has no gradient")
            call.gradients(loss, weights)
        except UnavailableError as error:
            message = f"--constraint linear needs loss() as a function of the model's output, and {error}"
            raise TaskError(message, path=self._task.source, hint="choose --constraint affine") from error
        return call.places

    def _loss(self, number: int) -> Tensor:
        """Return the loss of a batch at the model's weights."""
        batch = self._batches[number]
        self._meter.running = [batch.size]
        return self._mixed.counted.call(self._task.loss, copied(batch.data))

    def _run(self, number: int) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of the model at its weights that the loss of a batch uses, and that loss."""
        seen: list[Any] = []
        handle = self._mixed.model.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            with torch.no_grad():
                loss = self._loss(number)
        finally:
            handle.remove()
        found = tensors(seen[0]) if len(seen) == 1 else []
        if len(found) <= max(self._places):
            message = f"loss() calls the model {len(seen)} times or uses other outputs, in batch {number + 1}"
            raise TaskError(message, path=self._task.source, hint="choose --constraint affine")
        self._templates.setdefault(number, seen[0])
        return [found[place] for place in self._places], loss

    def _stacked(self, numbers: Sequence[int], members: Iterable[int]) -> list[Stacked]:
        """Return the outputs of some batches, which are 0 for candidates that are not among the ``members``."""
        mixed, stacked = self._mixed, dict[int, list[Tensor]]()
        for i in members:
            if not mixed.candidates.average([i]):
                mixed.candidates.materialize((torch.arange(self._n) == i).to(mixed.uniform()))
            for number in numbers:
                values, _ = self._run(number)
                rows = stacked.setdefault(number, [value.new_zeros(self._n, *value.shape) for value in values])
                for z, value in zip(rows, values, strict=True):
                    z[i] = value
            self._done += len(numbers)
            mixed.run.progress(STAGE, min(self._done, self._n * len(self._batches)), self._n * len(self._batches))
        return [stacked[number] for number in numbers]

    def _divided(self, numbers: Sequence[int]) -> list[Stacked]:
        """Return the outputs of all candidates for some batches; each rank runs its own candidates."""
        workers = self._mixed.run.workers
        own = range(workers.rank, self._n, workers.world_size)
        others = self._n - len(own)
        stacked = self._stacked(numbers, own or range(1)) if numbers else []  # any rank needs the outputs' structure
        self._meter.count("forward", others * sum(self._batches[k].size for k in numbers), others * len(numbers))
        if not own:
            stacked = [[torch.zeros_like(z) for z in outputs] for outputs in stacked]
        return [[workers.sum(z) for z in outputs] for outputs in stacked]

    def _dtype_of_loss(self, first: Stacked) -> torch.dtype:
        """Return the widest dtype of an output from which the loss has second derivatives."""
        c_N, reason = self._mixed.uniform(), ""
        for dtype in dict.fromkeys([c_N.dtype, first[0].dtype]):
            try:
                self._expanded(0, [z.to(dtype) for z in first], c_N)
            except (UnavailableError, TaskError) as error:
                reason = str(error)
            else:
                return dtype
        message = f"--constraint linear needs second derivatives of loss(): {reason}"
        raise TaskError(message, path=self._task.source, hint="choose --constraint affine")

    def _check_linear(self, first: Stacked) -> None:
        """Raise UsageError unless the model's output at mixtures of any sum is the combination of the outputs."""
        mixed, draws = self._mixed, torch.Generator().manual_seed(self._mixed.run.seed)
        for total in _SUMS:
            off_N = torch.randn(self._n, generator=draws, dtype=torch.float64) / self._n
            c_N = (total / self._n + off_N - off_N.mean()).to(mixed.uniform())
            mixed.candidates.materialize(c_N)
            values, loss = self._run(0)
            combined = _combined(first, c_N)
            mixed.candidates.materialize(mixed.uniform())  # the loss must not depend on the weights themselves
            expected = self._apply(self._task.loss, 0, combined).mean()
            slack = max(mixed.eps, *(torch.finfo(value.dtype).eps for value in values)) ** 0.5
            sizes = [float(size.max()) for size in _combined([z.abs() for z in first], c_N.abs())]
            off = [float((value - z).abs().max()) for value, z in zip(values, combined, strict=True)]
            if any(distance > slack * size for distance, size in zip(off, sizes, strict=True)):
                raise UsageError(f"--constraint linear: {_NONLINEAR}", hint=self._way_out())
            if abs(float(loss.mean() - expected)) > slack * max(abs(float(expected)), *sizes):
                message = "--constraint linear: loss() depends on more than the model's output"
                raise TaskError(message, path=self._task.source, hint="choose --constraint affine")

    def _way_out(self) -> str:
        """Return the hint for a model that is not linear; it may be, in what differs between the candidates."""
        checkpoints = self._mixed.checkpoints
        specs, kept = checkpoints[0].tensors, checkpoints[0].kept
        shared = [name for name in checkpoints[0].names if name not in kept and specs[name].dtype in FLOATING]
        shared, every = [name for name in shared if same_bytes(checkpoints, name)], len(shared)
        if not 0 < len(shared) < every:
            return _HINT
        return f"{keeping(shared)} if the model is linear in the rest, or {_HINT}"

    def _apply(self, function: Callable[[nn.Module, Any], _T], number: int, outputs: Stacked) -> _T:
        """Return a function of the task of a batch, from these outputs instead of the model's."""
        copies = {place: output.clone() for place, output in zip(self._places, outputs, strict=True)}
        self._meter.running = ()
        with _returning(self._mixed.model, replaced(self._templates[number], copies)):
            return self._mixed.counted.apply(function, copied(self._batches[number].data))

    def _expanded(
        self, number: int, outputs: Stacked, c_N: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of a batch's units, and the first and second derivatives of their weighted sum [1 + N, N].

        Raises:
            UnavailableError: if the loss has none.
        """
        inputs = [output.requires_grad_() for output in _combined(outputs, c_N)]
        with torch.enable_grad():
            loss = self._apply(self._task.loss, number, inputs)
            losses = loss.flatten() if loss.numel() == self._batches[number].size else loss.mean().view(1)
            total = c_N.new_zeros(1 + self._n, self._n)
            with derivatives():
                weighted = losses.sum() if weights is None else losses @ weights.to(losses)
                slopes = autograd.grad(weighted, inputs, create_graph=True)
                bent = _hvps(slopes, inputs, outputs)
        for z, slope, bent_z in zip(outputs, slopes, bent, strict=True):
            total[0] += z.flatten(1) @ slope.detach().flatten()
            total[1:] += z.flatten(1) @ bent_z.flatten(1).t()
        return losses.detach(), total


_NONLINEAR: Final = (
    "the model's output is not linear in its weights, so coefficients that do not sum to 1 make no average of it"
)


def keeping(names: Sequence[str]) -> str:
    """Return the options that keep tensors as they are in the last candidate."""
    return " ".join(f"--keep '{name}'" for name in names[:3]) + (" …" if len(names) > 3 else "")


def kept(batches: Iterable[Batch], number: int, device: torch.device) -> list[Batch]:
    """Return copies of all batches, ``number`` of them at most.

    Raises:
        OutOfMemoryError: if they do not fit in memory, by the size of the first.
    """
    read: list[Batch] = []
    for data, size in batches:
        read.append(Batch(copied(data), size))
        if len(read) == 1:
            nbytes = sum(leaf.nbytes for leaf in leaves(data) if isinstance(leaf, Tensor))
            _check_memory(number * nbytes, "the data", device)
    return read


def _check_memory(needed: int, what: str, device: torch.device) -> None:
    if needed > (free := round(_SHARE * free_memory(device))):
        message = f"--constraint linear keeps {what}, which take {sized(needed)}, and {sized(free)} may be used"
        raise OutOfMemoryError(f"{message} on {device}", hint="fit to fewer examples or candidates (--last, --every)")


def _combined(outputs: Stacked, c_N: Tensor) -> list[Tensor]:
    """Return Σ_i c_i z_i."""
    return [torch.tensordot(c_N.to(z), z, 1) for z in outputs]


def _hvps(slopes: Sequence[Tensor], inputs: Sequence[Tensor], directions: Stacked) -> list[Tensor]:
    """Return (∂²ℓ/∂o²) z_i for each output o [N, ...], the directions z_i being those of all outputs at once."""
    curved = [k for k, slope in enumerate(slopes) if slope.requires_grad]
    if not curved:
        return [torch.zeros_like(z) for z in directions]
    return list(
        autograd.grad(
            [slopes[k] for k in curved], inputs, [directions[k].to(slopes[k]) for k in curved],
            is_grads_batched=True, allow_unused=True, materialize_grads=True,
        )
    )  # fmt: skip


@contextmanager
def _returning(model: nn.Module, output: Any) -> Generator[None]:
    """Let each call of the model return ``output``."""
    before = vars(model).get("forward")
    model.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before
