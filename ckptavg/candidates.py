"""The candidate matrix: all N checkpoints as rows on the device, and the model as one flat vector that they mix into.

Shape suffixes: N = candidates, D = elements of one dtype (parameters first, then floating-point buffers),
Q = the parameters among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from ckptavg.checkpoint import Checkpoint
from ckptavg.dtypes import FLOATING, TORCH
from ckptavg.errors import InputError, TaskError
from ckptavg.readers import ITEM_SIZE, StoredTensor

_CHUNK: Final = 8 << 20  # bytes read at a time
_COLUMNS: Final = 1 << 20  # of a 16-bit matrix widened at a time
ReadInto = Callable[[str, int, memoryview], None]


@dataclass(frozen=True)
class _Slot:
    """Where one unique tensor of the model lies in its block; ``names`` are its names, more than one when tied."""

    names: tuple[str, ...]
    start: int
    numel: int


@dataclass(frozen=True)
class _Block:
    """Everything of one dtype: the model's parameters and gradients are views into these."""

    weights_D: Tensor
    gradient_Q: Tensor
    matrix_ND: Tensor
    slots: tuple[_Slot, ...]

    def pieces(self, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """The matrix up to column ``stop``: whole, or if its dtype has 16 bits, widened piece by piece.

        A coefficient of 1/5 rounded to bfloat16 is 0.1 % too large, which would scale every weight; and a product of
        millions of terms needs more than three digits.
        """
        if self.matrix_ND.dtype.itemsize >= 4:
            yield self.matrix_ND[:, :stop], slice(stop)
            return
        for start in range(0, stop, _COLUMNS):
            part = slice(start, min(start + _COLUMNS, stop))
            yield self.matrix_ND[:, part].to(torch.float32), part


class Candidates:
    """N checkpoints of one model on its device.

    ``materialize`` is w = Pᵀc and ``pullback`` is P g, one matrix-vector product each (a dtype), whatever the number
    of parameters: the model's parameters are views into one flat vector, and so are their gradients. A parameter that
    is tied to another is in it once. Memory: (N + 2)·D elements; sums of 16-bit candidates are in float32.

    Args:
        model: the task's model, on its device; its parameters' storage is replaced.
        checkpoints: N open checkpoints with equal names, shapes and dtypes, and the model's own names and shapes.
        progress: is told how many rows are loaded.
    Raises:
        TaskError: if names or shapes are not the model's.
        InputError: if a weight is NaN or infinite, or tied parameters differ in a file.
    """

    def __init__(
        self, model: nn.Module, checkpoints: Sequence[Checkpoint], progress: Callable[[str, int, int], None]
    ) -> None:
        self.model = model
        self.n = len(checkpoints)
        self.device = next(model.parameters()).device
        unique = _unique_tensors(model)
        _check_names(unique, checkpoints[0].tensors)
        by_dtype: dict[torch.dtype, list[tuple[tuple[str, ...], Tensor]]] = {}
        self._integers: list[tuple[tuple[str, ...], Tensor, list[Tensor]]] = []
        for names, tensor in unique:
            if tensor.is_floating_point():
                by_dtype.setdefault(tensor.dtype, []).append((names, tensor))
            else:
                self._integers.append((names, tensor, []))
        self._blocks = [self._block(dtype, tensors) for dtype, tensors in by_dtype.items()]
        for i, checkpoint in enumerate(checkpoints):
            self._load_row(i, checkpoint)
            progress("reading candidates", i + 1, self.n)
        model.requires_grad_(True)

    @property
    def nbytes(self) -> int:
        """The bytes that the candidate matrix takes on the device."""
        return sum(block.matrix_ND.nbytes for block in self._blocks)

    @torch.no_grad()
    def materialize(self, c_N: Tensor) -> None:
        """Make the model's floating-point state w = Σ_i c_i w_i."""
        for block in self._blocks:
            for piece_ND, part in block.pieces(len(block.weights_D)):
                c = c_N.to(piece_ND)
                if piece_ND.dtype == block.weights_D.dtype:
                    torch.mv(piece_ND.t(), c, out=block.weights_D[part])
                else:
                    block.weights_D[part] = piece_ND.t().mv(c)

    def zero_gradient(self) -> None:
        """Forget the gradient that backward passes have added up."""
        for block in self._blocks:
            block.gradient_Q.zero_()

    @torch.no_grad()
    def pullback(self) -> Tensor:
        """[N], ∂ℓ/∂c_i = ⟨w_i, ∂ℓ/∂w⟩, from the gradient added up since `zero_gradient`."""
        products = [
            piece_ND.mv(block.gradient_Q[part].to(piece_ND))
            for block in self._blocks
            for piece_ND, part in block.pieces(len(block.gradient_Q))
        ]
        widest = max((product.dtype for product in products), key=lambda dtype: dtype.itemsize)
        return torch.stack([product.to(widest) for product in products]).sum(dim=0)

    @torch.no_grad()
    def take_integers(self, i: int) -> None:
        """Set the state that is not floating point to that of candidate ``i``."""
        for _, tensor, values in self._integers:
            tensor.copy_(values[i])

    @torch.no_grad()
    def load(self, specs: Mapping[str, StoredTensor], read_into: ReadInto) -> None:
        """Set the model's whole state from bytes of elsewhere, such as the file about to be written."""
        for block in self._blocks:
            for slot in block.slots:
                name = _present(slot.names, specs)
                _read(specs[name], name, read_into, block.weights_D[slot.start :][: slot.numel])
        for names, tensor, _ in self._integers:
            name = _present(names, specs)
            _read(specs[name], name, read_into, tensor)

    def _block(self, dtype: torch.dtype, tensors: list[tuple[tuple[str, ...], Tensor]]) -> _Block:
        tensors = sorted(tensors, key=lambda item: not isinstance(item[1], nn.Parameter))  # parameters first
        size = sum(tensor.numel() for _, tensor in tensors)
        trained = sum(tensor.numel() for _, tensor in tensors if isinstance(tensor, nn.Parameter))
        weights_D = torch.empty(size, dtype=dtype, device=self.device)
        gradient_Q = torch.zeros(trained, dtype=dtype, device=self.device)
        slots: list[_Slot] = []
        start = 0
        for names, tensor in tensors:
            stop = start + tensor.numel()
            if isinstance(tensor, nn.Parameter):
                tensor.grad = gradient_Q[start:stop].view(tensor.shape)
            tensor.data = weights_D[start:stop].view(tensor.shape)
            slots.append(_Slot(names, start, tensor.numel()))
            start = stop
        matrix_ND = torch.empty(self.n, size, dtype=dtype, device=self.device)
        return _Block(weights_D, gradient_Q, matrix_ND, tuple(slots))

    def _load_row(self, i: int, checkpoint: Checkpoint) -> None:
        for block in self._blocks:
            row_D = block.matrix_ND[i]
            for slot in block.slots:
                name = _present(slot.names, checkpoint.tensors)
                _check_tied(checkpoint, slot.names)
                _read(checkpoint.spec(name), name, checkpoint.read_into, row_D[slot.start :][: slot.numel])
            if not torch.isfinite(row_D).all():
                bad = next(s for s in block.slots if not torch.isfinite(row_D[s.start :][: s.numel]).all())
                raise InputError(
                    f"{int((~torch.isfinite(row_D[bad.start :][: bad.numel])).sum())} values are NaN or infinite",
                    path=checkpoint.path,
                    tensor=bad.names[0],
                    hint=f"leave it out with --exclude '{checkpoint.path.name}'",
                )
        for names, tensor, values in self._integers:
            value = torch.empty_like(tensor)
            name = _present(names, checkpoint.tensors)
            _read(checkpoint.spec(name), name, checkpoint.read_into, value)
            values.append(value)


def _unique_tensors(model: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of the state dict once, with all of its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):  # get_extra_state may give anything
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return [(tuple(names), tensor) for names, tensor in found.values()]


def _check_names(unique: list[tuple[tuple[str, ...], Tensor]], stored: Mapping[str, StoredTensor]) -> None:
    known = {name for names, _ in unique for name in names}
    extra = sorted(stored.keys() - known)
    missing = [names[0] for names, _ in unique if not any(name in stored for name in names)]
    if extra or missing:
        lists = [
            f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("it lacks", extra), ("only it has", missing))
            if names
        ]
        raise TaskError(
            f"the task's model() does not fit the checkpoints: {'; '.join(lists)}",
            hint="make model() the module whose state_dict() was saved, or choose the right part with --key",
        )
    for names, tensor in unique:
        name = _present(names, stored)
        if stored[name].shape != tuple(tensor.shape):
            raise TaskError(
                f"the task's model() has {name} of shape {list(tensor.shape)}, "
                f"the checkpoints {list(stored[name].shape)}"
            )
        if (stored[name].dtype in FLOATING) != tensor.is_floating_point():
            raise TaskError(f"the task's model() has {name} as {tensor.dtype}, the checkpoints as {stored[name].dtype}")


def _present(names: tuple[str, ...], stored: Mapping[str, StoredTensor]) -> str:
    return next(name for name in names if name in stored)


def _check_tied(checkpoint: Checkpoint, names: tuple[str, ...]) -> None:
    """Names that are one parameter in the model must hold one value in the file."""
    stored = [name for name in names if name in checkpoint.tensors]
    if len({checkpoint.spec(name) for name in stored}) < 2:
        return
    contents: list[bytearray] = []
    for name in stored:
        contents.append(bytearray(checkpoint.spec(name).nbytes))
        checkpoint.read_into(name, 0, memoryview(contents[-1]))
    if any(content != contents[0] for content in contents):
        raise InputError(
            f"is tied to {stored[0]} in the task's model, but the file holds other values",
            path=checkpoint.path,
            tensor=stored[-1],
        )


def _read(spec: StoredTensor, name: str, read_into: ReadInto, out: Tensor) -> None:
    """Stream a tensor into ``out`` (any shape, device and dtype, contiguous) through one small buffer."""
    item = ITEM_SIZE[spec.dtype]
    flat = out.view(-1)
    buffer = bytearray(min(spec.nbytes, _CHUNK))
    for start in range(0, spec.numel, _CHUNK // item):
        count = min(_CHUNK // item, spec.numel - start)
        read_into(name, start, memoryview(buffer)[: count * item])
        flat[start : start + count] = torch.frombuffer(buffer, dtype=TORCH[spec.dtype], count=count)
