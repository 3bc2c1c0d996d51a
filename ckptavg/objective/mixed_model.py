"""One model that is set to any mixture of the candidates."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ckptavg.average import PlannedOutput, derived
from ckptavg.average.weighted_sum import CHUNK, AddedNoise, output_specs
from ckptavg.candidates import Candidates, sharded
from ckptavg.candidates.copied import copied_tensors
from ckptavg.candidates.flat import is_mixable, unique_tensors
from ckptavg.candidates.loading import ReadInto, Specs, read_like
from ckptavg.candidates.plan import Plan
from ckptavg.candidates.products import why_slow
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.context import Run
from ckptavg.errors import TaskError
from ckptavg.objective import batchnorm
from ckptavg.objective.counted_model import CountedModel
from ckptavg.objective.precision import Compiled, precision
from ckptavg.objective.spectral_vectors import SpectralVectors
from ckptavg.options.search import SearchOptions
from ckptavg.report.result import MatrixResult
from ckptavg.runtime.workers import ALONE
from ckptavg.tasks import Task
from ckptavg.tasks.hugging_face.adapter import Adapter

PlanAdapter: TypeAlias = Callable[[Coefficients], PlannedOutput]


class MixedModel:
    """The task's model, and the candidate matrix that its weights are taken from.

    Args:
        task: the task.
        checkpoints: the N candidates, in training order.
        run: the device and the ranks; with ``shard`` each rank has a shard of the model and of every candidate, else
            it holds all of them.
        search: how the candidates are kept, and in which precision the model runs in a search.
        count: called before each forward pass of the model.
        exact_adapter: plans the adapter that is the average in weight space, whose rank differs from the candidates',
            for mixtures that are scored exactly; None if averages of adapters are those of their factors.
    """

    def __init__(
        self, task: Task, checkpoints: Sequence[Checkpoint], run: Run, search: SearchOptions, count: Callable[[], None],
        exact_adapter: PlanAdapter | None = None,
    ) -> None:  # fmt: skip
        self.task = task
        self.checkpoints = checkpoints
        self.run = run
        self.search = search
        self.count = count
        self.exact_adapter = exact_adapter
        self.precision = precision(search.precision, run.device)
        self._compiled: Compiled | None = None

    @cached_property
    def candidates(self) -> Candidates:
        """Candidate matrix and model; loaded on first use, after the strategy has checked its settings."""
        run, search, n = self.run, self.search, len(self.checkpoints)
        workers = run.workers if search.shard else ALONE
        if search.shard:
            torch.manual_seed(run.seed)
            model = sharded.build(self.task.model, run.device, workers)
        else:
            model = self.build().eval()
        plan = Plan.of(
            model, n, copies=copied_tensors(model, self.checkpoints),
            bits=search.bits, group_size=search.group_size, offload=search.offload,
            device=run.device, parts=workers.world_size, sharing=run.workers.local_world_size,
        )  # fmt: skip
        memory_use = plan.check()
        if n > 1:
            run.progress(memory_use, 0, 0)
        bits = min(run.workers.gather(plan.bits))  # also a barrier: no rank allocates before all have checked memory
        candidates = Candidates(
            model, self.checkpoints, run.progress,
            bits=bits, group_size=search.group_size, offload=search.offload, workers=workers,
        )  # fmt: skip
        for checkpoint in self.checkpoints:
            checkpoint.check_unchanged()  # now, rather than only at the end of a long search
        if search.compile:
            self._compiled = Compiled(model)
        return candidates

    def build(self, adapter: Mapping[str, Any] | None = None) -> nn.Module:
        """Return a new model of the task, on the device; of a PEFT model its adapter is the state.

        Args:
            adapter: the adapter_config.json of an adapter with other ranks than the candidates'.
        """
        torch.manual_seed(self.run.seed)
        model = self.task.model()
        if hasattr(model, "peft_config") and not isinstance(model, Adapter):
            model = Adapter(model, self.checkpoints[0].names)
        if self.exact_adapter and not isinstance(model, Adapter):
            message = "--adapter exact changes the adapter's rank, so it needs a PEFT model to be scored"
            raise TaskError(message, path=self.task.source, hint="return get_peft_model(...) from model()")
        if adapter is not None and isinstance(model, Adapter):
            return model.reranked(adapter).to(self.run.device)
        used = vars(self).get("candidates")
        if used is not None and not set(map(id, model.parameters())).isdisjoint(map(id, used.model.parameters())):
            model = copy.deepcopy(model).train()  # model() returns the same one again, with what it has derived
            vars(model).pop("forward", None)  # compiled
        if empty := next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None):
            message = f"the model must be ready to run, but its {empty} is on the meta device: allocate it"
            raise TaskError(message, path=self.task.source)
        return model.to(self.run.device)

    def build_from(self, specs: Specs, read_into: ReadInto, adapter: Mapping[str, Any] | None = None) -> CountedModel:
        """Return a new model with the tensors of a file."""
        model = self.build(adapter)
        state = model.state_dict(keep_vars=True)
        for names, tensor in unique_tensors(model):
            if not specs.keys().isdisjoint(names):  # a sparse one may be too large for the file
                state |= dict.fromkeys(names, read_like(names, specs, read_into, tensor))
        model.load_state_dict(state, strict=True)
        return CountedModel(model.eval(), self.count)

    @property
    def eps(self) -> float:
        """The largest relative spacing of the numbers that parameters can have."""
        dtypes = {weights.dtype for weights in self.model.parameters() if is_mixable(weights)}
        return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    @property
    def model(self) -> nn.Module:
        """Model on the device."""
        return self.candidates.model

    @cached_property
    def counted(self) -> CountedModel:
        """The model, for calls of the task's functions."""
        return CountedModel(self.model, self.count)

    @cached_property
    def vectors(self) -> SpectralVectors:
        """Vectors of spectral norm, recomputed for every mixture."""
        return SpectralVectors(self.model, self.checkpoints)

    @cached_property
    def norms(self) -> Mapping[str, batchnorm.Layer]:
        """The BatchNorm layers whose statistics are recomputed for every mixture, by name."""
        return batchnorm.layers(self.model)

    def set_to(self, coefficients: Coefficients, *, exact: bool, noise: AddedNoise | None = None) -> None:
        """Load a mixture, and add ``noise`` to it: from the files if ``exact``, else from the candidate matrix.

        A sum that is rounded to 16 bits before the noise is added would be rounded twice, so it is read from the files.
        """
        # a row that is not finite makes every product with the matrix non-finite, even with a coefficient of 0
        narrow = noise is not None and self.eps > torch.finfo(torch.float32).eps
        from_files = narrow or (exact and not self.candidates.exact)
        if from_files or any(checkpoint.allow_nonfinite for checkpoint in self.checkpoints):
            specs = output_specs(self.checkpoints)
            parts = derived.average(self.checkpoints, coefficients, specs, only=self.candidates.ranges, noise=noise)
            self.candidates.assign(specs, parts, last=coefficients.selected[-1])
            return
        chosen = coefficients.selected
        if not (coefficients.uniform_subset and self.candidates.average(chosen, last=chosen[-1])):
            c_GN = self.uniform().new_tensor(coefficients.values)
            self.candidates.materialize(c_GN, coefficients.groups, last=chosen[-1])
        if noise is not None:
            self.candidates.add(noise, CHUNK)  # in the pieces of the files, so that σ is computed once
        self.vectors.converge(coefficients)

    def approach(self, c_GN: Tensor, groups: Groups = EVERYTHING) -> None:
        """Load a mixture for its derivatives, in which the vectors of spectral norm are constants, nearly converged.

        See `Candidates.materialize` for the arguments.
        """
        if self.vectors.need_mean:
            self.candidates.materialize(self.uniform())
            self.vectors.converge_at_mean()
        self.candidates.materialize(c_GN, groups)
        self.vectors.approach()

    def uniform(self) -> Tensor:
        """See `Losses.uniform`."""
        dtype = torch.float32 if self.run.device.type == "mps" else torch.float64  # mps has no float64
        n = len(self.checkpoints)
        return torch.full((n,), 1 / n, dtype=dtype, device=self.run.device)

    def plain(self) -> AbstractContextManager[None]:
        """Run the model as it is in the context, not compiled."""
        return nullcontext() if self._compiled is None else self._compiled.paused()

    @property
    def matrix(self) -> MatrixResult:
        """Properties of the candidate matrix, for the report."""
        candidates = self.candidates
        return MatrixResult(
            bits=candidates.bits, group_size=None if candidates.exact else self.search.group_size,
            bytes=candidates.nbytes, error=candidates.error,
            offload=self.search.offload if candidates.streamed else "none", precision=self.precision,
            compiled=self._compiled is not None and self._compiled.failure is None,
        )  # fmt: skip

    @property
    def notes(self) -> list[str]:
        """Remarks for the report: settings without effect."""
        notes: list[str] = []
        if self.search.offload == "cpu" and self.run.device.type == "cpu":
            notes.append("--offload cpu changes nothing on a CPU: the candidates are in its memory already")
        if self._compiled is not None and self._compiled.failure is not None:
            notes.append(f"--compile was given up, and the model ran as it is: {self._compiled.failure}")
        if self.run.device.type == "cuda" and (why := why_slow()):
            notes.append(
                f"mixing candidates took up to ten times as long as it could: Triton does not work here ({why})"
            )
        return notes

    def describe(self, coefficients: Coefficients) -> str:
        """Return the words for a mixture in an error."""
        chosen = [self.checkpoints[i] for i in coefficients.selected]
        if len(chosen) == 1:
            return f"candidate {chosen[0].path}"
        return "the mixture of steps " + ", ".join(str(checkpoint.step) for checkpoint in chosen)
