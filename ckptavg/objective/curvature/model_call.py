"""Split a loss at the model's output: from weights to output, and from output to loss."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, autograd, nn

from ckptavg.objective.curvature.directions import UnavailableError, derivatives, gradients_of


class Call:
    """Model call made by a loss: its output tensors, and the leaf tensors that replaced them in the loss."""

    def __init__(self) -> None:
        self.calls = 0
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.places: list[int] = []  # index of each output among all floating-point tensors returned
        self.outputs: list[Tensor] = []
        self._leaves: list[Tensor] = []
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the output by leaves; the loss gets copies of them, in case it changes them in place."""
        self.calls += 1
        self.args, self.kwargs = args, kwargs
        kind = next(module.parameters()).device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.autocast = lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
        place = -1

        def detach(tensor: Tensor) -> Tensor:
            nonlocal place
            place += tensor.is_floating_point()
            if not (tensor.is_floating_point() and tensor.requires_grad):
                return tensor
            self.places.append(place)
            self.outputs.append(tensor)
            self._leaves.append(tensor.detach().requires_grad_())
            return self._leaves[-1].clone()

        return _mapped(output, detach)

    def gradients(self, loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return ∂ℓ/∂o of the outputs that the loss depends on; the others are dropped."""
        if self.calls != 1:
            raise UnavailableError(f"loss() calls the model {self.calls} times, not once")
        direct = gradients_of(loss, weights)
        if any(slope is not None for slope in direct):
            raise UnavailableError("loss() depends on the weights by more than the model's output")
        with derivatives():
            slopes = gradients_of(loss, self._leaves, again=True)
        used = [k for k, slope in enumerate(slopes) if slope is not None]
        self.places, self.outputs = [self.places[k] for k in used], [self.outputs[k] for k in used]
        self._leaves = [self._leaves[k] for k in used]
        used_slopes = [slope for slope in slopes if slope is not None]
        if not any(slope.requires_grad for slope in used_slopes):
            raise UnavailableError("loss() is linear in the model's output, as when the model returns the loss")
        return used_slopes

    def hvp(self, slopes: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
        """Return (∂²ℓ/∂o²) u for each output, u being ``tangents``."""
        for leaf in self._leaves:
            leaf.grad = None
        curved = [k for k, slope in enumerate(slopes) if slope.requires_grad]
        autograd.backward([slopes[k] for k in curved], [tangents[k] for k in curved], retain_graph=True)
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]


@contextmanager
def detach_outputs(model: nn.Module) -> Generator[Call]:
    """Detach and record the output of model calls inside the context."""
    call = Call()
    handle = model.register_forward_hook(call.hook, with_kwargs=True)
    try:
        yield call
    finally:
        handle.remove()


def tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in a model's output, in order."""
    floating: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            floating.append(tensor)
        return tensor

    _mapped(output, collect)
    return floating


def replaced(output: Any, values: Mapping[int, Tensor]) -> Any:
    """Return a model's output with other values for some of its floating-point tensors, by their place in `tensors`."""
    places = itertools.count()

    def replace(tensor: Tensor) -> Tensor:
        return values.get(next(places), tensor) if tensor.is_floating_point() else tensor

    return _mapped(output, replace)


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to every tensor and keep the nesting; tensors inside other objects are left alone."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, MutableMapping):  # transformers' ModelOutput too, which sets the attribute with the item
        copied: Any = copy.copy(output)
        for key, value in output.items():
            copied[key] = _mapped(value, change)
        return copied
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_mapped(value, change) for value in output))  # pyright: ignore
    if isinstance(output, list | tuple):
        return type(output)(_mapped(value, change) for value in output)  # pyright: ignore
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = [field.name for field in dataclasses.fields(output) if field.init]
        return dataclasses.replace(output, **{name: _mapped(getattr(output, name), change) for name in fields})
    return output
