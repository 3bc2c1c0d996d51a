"""The candidate matrix on the device: N checkpoints as rows, mixed into the flat vector that holds the model.

Shape suffixes: N = candidates, G = groups of tensors, D = elements of one dtype (parameters first, then floating-point
buffers), Q = the parameters among them, C = columns of a block.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ckptavg.candidates import plan
from ckptavg.candidates.copied import Copied, Copies, copied_tensors
from ckptavg.candidates.dense import COLUMNS, Dense
from ckptavg.candidates.flat import Flat, flatten, is_mixable, unique_tensors
from ckptavg.candidates.loading import (
    ReadInto,
    SharedError,
    Specs,
    check_names,
    present,
    read_columns,
    read_row,
    read_rows,
)
from ckptavg.candidates.packed import Packed
from ckptavg.candidates.plan import EXACT, Offload
from ckptavg.candidates.products import Matrix, column_runs, dot, mix
from ckptavg.candidates.running_sum import RunningSum
from ckptavg.candidates.sharded import flatten_shards
from ckptavg.candidates.streamed import Streamed
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.coefficients import EVERYTHING, Groups
from ckptavg.runtime.workers import ALONE, Workers


class Candidates:
    """N checkpoints of one model on its device.

    ``materialize`` is w = Pᵀc and ``pullback`` is P g: one matrix-vector product each per dtype, regardless of the
    number of parameter tensors, because the parameters and their gradients are views into flat vectors. Tied parameters
    are stored once. Memory: the matrix and two vectors of D elements; with ``bits`` below 32, also the mean. An
    offloaded matrix is streamed to the device in pieces, and `average` reads only the rows in which the subset differs
    from the previous one.

    With a sharded model each rank holds the columns of its own shards: ``materialize`` needs no communication, and
    ``pullback`` returns this rank's partial sum.

    Args:
        model: the task's model, on its device; its parameters' storage is replaced.
        checkpoints: N open checkpoints with equal names, shapes and dtypes; names and shapes must match the model's.
        progress: callback ``(stage, done, total)``, called once per loaded row.
        bits: bits per element of the matrix; 32 keeps the model's dtype, fewer use `Packed`.
        group_size: elements that share a scale and a zero point.
        offload: where an exact matrix is kept instead of on the device: host memory ("cpu") or its files ("disk").
        workers: the ranks over which the model is sharded, if it is.
    Raises:
        TaskError: if names or shapes do not match the model's.
        InputError: if a weight is NaN or infinite, or tied parameters differ in a file.
    """

    def __init__(
        self, model: nn.Module, checkpoints: Sequence[Checkpoint], progress: Callable[[str, int, int], None], *,
        bits: int = EXACT, group_size: int = 128, offload: Offload = "none", workers: Workers = ALONE,
    ) -> None:  # fmt: skip
        self.model = model
        self.n = len(checkpoints)
        self._checkpoints = checkpoints
        self.bits = bits
        self.exact = bits == EXACT  # the matrix has the model's dtype
        self._workers = workers
        check_names(unique_tensors(model), checkpoints[0].tensors)
        copies = dict(copied_tensors(model, checkpoints))
        while True:
            self._build(copies, group_size, offload)
            try:
                self._load(checkpoints, progress)
                break
            except SharedError as error:
                copies |= dict.fromkeys(error.names, 1)
        self.streamed = any(isinstance(matrix, Streamed) for _, matrix in self._blocks)  # kept off the device
        self.nbytes = sum(matrix.nbytes for _, matrix in self._blocks)  # of the matrix on this device
        # element range of each tensor that this rank holds
        self.ranges = {name: range(len(vector)) for name, vector in self._copied.targets().items()}
        for flat, _ in self._blocks:
            for slot in flat.slots:
                self.ranges |= dict.fromkeys(slot.names, range(slot.first, slot.first + slot.numel))
        squared_errors = [torch.zeros(2, dtype=torch.float64)]
        squared_errors += [matrix.squared_errors.cpu().double() for _, matrix in self._blocks]
        error, norm = workers.sum(torch.stack(squared_errors)).T
        # the largest ‖d̂ − d‖/‖d‖ over dtypes: the quantization error of the differences from the mean
        self.error = float((error / norm).nan_to_num(0.0).max().sqrt())
        model.requires_grad_(True)
        self._copied.freeze()

    @property
    def averaged_buffers(self) -> frozenset[str]:
        """Names of the floating-point buffers that are mixed."""
        buffers = (names for names, tensor in self._floats if not isinstance(tensor, nn.Parameter))
        return frozenset(name for names in buffers for name in names if name in self._checkpoints[0].tensors)

    @property
    def shared(self) -> Sequence[str]:
        """Names of the floating-point tensors that are copied because they are equal in all candidates."""
        return [name for name, count in self._copies.items() if count == 1]

    @torch.no_grad()
    def materialize(self, c_GN: Tensor, groups: Groups = EVERYTHING, *, last: int | None = -1) -> None:
        """Set the model to w = Σ_i c_i w_i, and the tensors that are copied to those of candidate ``last``, if any.

        Each row of c_GN, [G, N] or [N], applies to the tensors whose names begin with its group's. It sums to one
        unless the matrix is `exact`, since only then no row is stored as the difference from the mean.
        """
        self._copied.take(last)
        c_GN = c_GN.view(len(groups), self.n)
        for flat, matrix in self._blocks:
            mix(flat, matrix, c_GN, groups)
            flat.push()

    @torch.no_grad()
    def average(self, chosen: Sequence[int], *, last: int | None = -1) -> bool:
        """Set the model to the mean of candidates ``chosen``, reading only rows that changed; see `materialize`.

        Returns False, with the model unchanged, where `materialize` is faster: for a matrix on a GPU, and for one in
        the CPU's memory if those chosen are few, or all of the candidates.
        """
        sums = next(self.model.parameters()).device.type == "cpu" and plan.FEW_ROWS < len(chosen) < self.n
        if not (self.streamed or sums):
            return False
        self._copied.take(last)
        for flat, matrix in self._blocks:
            if isinstance(matrix, Streamed):
                matrix.average(chosen, flat.weights_D)
            else:
                self._running_sum(flat, matrix).mean(chosen, matrix.row_blocks, flat.weights_D, matrix.mean_D)
            flat.push()
        return True

    def _running_sum(self, flat: Flat, matrix: Matrix) -> RunningSum:
        if id(matrix) not in self._sums:
            self._sums[id(matrix)] = RunningSum(self.n, len(flat.weights_D), flat.slots)
            for rows_NC, part in matrix.row_blocks(range(self.n)):
                self._sums[id(matrix)].observe(rows_NC, part)
        return self._sums[id(matrix)]

    @torch.no_grad()
    def add(self, noise: Callable[[str, int, int], NDArray[np.float64] | None], chunk: int) -> None:
        """Add noise to the model's weights; ``noise(name, start, count)`` is that of ``chunk`` elements, or None."""
        for flat, _ in self._blocks:
            for slot in flat.slots:
                name = present(slot.names, self._checkpoints[0].tensors)
                for start in range(0, slot.numel, chunk):
                    weights_C = flat.weights_D[slot.start : slot.start + slot.numel][start : start + chunk]
                    if (added := noise(name, slot.first + start, len(weights_C))) is not None:
                        weights_C += torch.from_numpy(added).to(weights_C)
            flat.push()

    def zero_gradient(self) -> None:
        """Zero the accumulated gradient."""
        for flat, _ in self._blocks:
            flat.gradient_Q.zero_()

    @torch.no_grad()
    def pullback(self, groups: Groups = EVERYTHING) -> Tensor:
        """Return [G, N], ∂ℓ/∂c_i = ⟨w_i, ∂ℓ/∂w⟩ per group, from the gradient accumulated since `zero_gradient`.

        With a sharded model this is a partial result, to be summed over ranks.
        """
        total_GN = self._zeros(groups)
        for flat, matrix in self._blocks:
            dot(flat, matrix, total_GN, groups)
        return total_GN.mul_(self._workers.world_size)  # FSDP2 averages the gradients over ranks instead of summing

    @torch.no_grad()
    def distances(self, groups: Groups = EVERYTHING) -> Tensor:
        """Return [G, N], ‖w_i − w̄‖₂ over the parameters of each group, where w̄ is the mean of the N rows."""
        total_GN = self._zeros(groups)
        for flat, matrix in self._blocks:
            for run_NC, _, g in column_runs(flat, matrix, groups, len(flat.gradient_Q)):
                for piece_NC in run_NC.split(COLUMNS, dim=1):
                    mean_C, many = piece_NC.mean(dim=0), max(1, piece_NC.nbytes // plan.BUFFER)
                    parts = [(rows - mean_C).square().sum(dim=1) for rows in piece_NC.tensor_split(many)]
                    total_GN[g] += torch.cat(parts)
        return self._workers.sum(total_GN).sqrt()

    def differences(self, groups: Groups = EVERYTHING) -> Iterator[tuple[Tensor, int]]:
        """Yield ([N, C], group): the differences w_i − w̄ over the parameters of this rank, some columns at a time."""
        for flat, matrix in self._blocks:
            for run_NC, _, g in column_runs(flat, matrix, groups, len(flat.gradient_Q)):
                for piece_NC in run_NC.split(plan.columns(self.n, run_NC.shape[1], run_NC.itemsize), dim=1):
                    yield piece_NC - piece_NC.mean(dim=0), g

    def blocks(self, size: int | None) -> Groups:
        """See `ckptavg.objective.Losses.blocks`; each floating-point tensor is in one block, under all its names.

        Those that are copied, on which coefficients have no effect, are in the last block.
        """
        by_block: dict[str, tuple[str, ...]] = {}
        block, filled = "", math.inf
        for names, tensor in self._floats:
            if size is None:
                block = names[0].rpartition(".")[0]
            elif filled > size:
                block, filled = names[0], 0
            by_block[block] = (*by_block.get(block, ()), *names)
            filled += tensor.numel()
        by_block = by_block or {"": ("",)}
        by_block[block] = (*by_block[block], *(name for name in self.ranges if name in self._copies))
        return tuple(by_block.values())

    @torch.no_grad()
    def load(self, specs: Specs, read_into: ReadInto) -> None:
        """Load the model's whole state from another source, such as the output file before it is published."""
        for flat, _ in self._blocks:
            read_columns(flat.slots, specs, read_into, 0, flat.weights_D)
            flat.push()
        self._copied.load(specs, read_into)

    @torch.no_grad()
    def assign(self, specs: Specs, parts: Iterable[tuple[str, int, memoryview]], *, last: int = -1) -> None:
        """Load the model's state from ``(name, byte offset, bytes)`` parts, and sparse tensors from ``last``."""
        self._copied.take(last)
        targets = {name: (vector, 0) for name, vector in self._copied.targets().items()}
        for flat, _ in self._blocks:
            for slot in flat.slots:
                targets |= dict.fromkeys(slot.names, (flat.weights_D, slot.start - slot.first))
        for name, offset, data in parts:
            values = torch.frombuffer(data, dtype=TORCH[specs[name].dtype])
            vector, shift = targets[name]
            start = offset // values.itemsize + shift
            vector[start : start + len(values)] = values
        self._copied.mark_changed()
        for flat, _ in self._blocks:
            flat.push()

    def _zeros(self, groups: Groups) -> Tensor:
        vectors = [flat.gradient_Q for flat, _ in self._blocks]
        dtype = max((vector.dtype for vector in vectors), key=lambda dtype: dtype.itemsize, default=torch.float32)
        device = next(self.model.parameters()).device
        return torch.zeros(len(groups), self.n, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def _build(self, copies: Copies, group_size: int, offload: Offload) -> None:
        """Divide the model's tensors into those that are copied and those that are mixed; allocate their matrices."""
        self._copies = copies
        specs = self._checkpoints[0].tensors
        unique = [(names, tensor) for names, tensor in unique_tensors(self.model) if not specs.keys().isdisjoint(names)]
        self._floats = [(n, tensor) for n, tensor in unique if is_mixable(tensor) and copies.keys().isdisjoint(n)]
        mixed = {id(tensor) for _, tensor in self._floats}
        self._copied = Copied([(names, tensor) for names, tensor in unique if id(tensor) not in mixed], copies)
        self._blocks: list[tuple[Flat, Matrix]] = []
        self._sums: dict[int, RunningSum] = {}
        for dtype in dict.fromkeys(tensor.dtype for _, tensor in self._floats):
            tensors = [(names, tensor) for names, tensor in self._floats if tensor.dtype == dtype]
            one_rank = self._workers.world_size == 1
            flat = flatten(tensors) if one_rank else flatten_shards(self.model, tensors, self._workers)
            if offload == "disk" or (offload == "cpu" and flat.weights_D.device.type != "cpu"):
                matrix = Streamed(self._checkpoints, flat, in_files=offload == "disk")
            elif self.exact:
                matrix = Dense(self.n, flat.weights_D)
            else:
                matrix = Packed(self.n, flat.weights_D, bits=self.bits, group=group_size)
            self._blocks.append((flat, matrix))

    def _rows(self, flat: Flat, matrix: Matrix) -> Generator[None]:
        """Read all rows of one matrix; yields after each."""
        if isinstance(matrix, Dense) and matrix.rows_ND.device.type == "cpu":
            yield from read_rows(self._checkpoints, flat, list(matrix.rows_ND))
            return
        for i, checkpoint in enumerate(self._checkpoints):
            matrix.encode(i, read_row(checkpoint, flat, self._checkpoints, flat.weights_D))
            yield

    @torch.no_grad()
    def _load(self, checkpoints: Sequence[Checkpoint], progress: Callable[[str, int, int], None]) -> None:
        """Read every row; twice if rows are stored as differences from their mean, which the first pass computes."""
        means = [(flat, matrix.mean_D) for flat, matrix in self._blocks if matrix.mean_D is not None]
        for i, checkpoint in enumerate(checkpoints if means else ()):
            for flat, mean_D in means:
                mean_D.add_(read_row(checkpoint, flat, checkpoints, flat.weights_D), alpha=1 / self.n)
            progress("averaging candidates", i + 1, self.n)
        with ExitStack() as stack:
            rows = [stack.enter_context(closing(self._rows(flat, matrix))) for flat, matrix in self._blocks]
            for i, (checkpoint, *_) in enumerate(zip(checkpoints, *rows, strict=True)):
                self._copied.read(checkpoint)
                checkpoint.check_unchanged()
                progress("reading candidates", i + 1, self.n)
