"""A model whose forward passes are counted where they happen."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from ckptavg.objective.batchnorm import Layer as BatchNorm

_T = TypeVar("_T")


class CountedModel:
    """A model in eval mode, on which functions of a task are called.

    A function may run parts of the model instead of the model itself (``model.encoder(inputs)``): a call that does
    counts as one forward pass. Hooks on the parts are added when that happens for the first time.

    Args:
        model: the model.
        count: called before each forward pass.
    """

    def __init__(self, model: nn.Module, count: Callable[[], None]) -> None:
        self.model = model
        self._modules = [module for module in model.modules() if not isinstance(module, BatchNorm)]
        self._calls = _Calls(count)
        self._watches_parts = False
        model.register_forward_pre_hook(self._calls.run_whole)

    @property
    def in_training(self) -> bool:
        """Whether a function has run the model, or a part of it other than BatchNorm, in training mode."""
        return self._calls.in_training

    def apply(self, function: Callable[[nn.Module, Any], _T], batch: Any) -> _T:
        """Return ``function(model, batch)`` of a function that runs no part of the model."""
        return function(self.model, batch)

    def call(self, function: Callable[[nn.Module, Any], _T], batch: Any) -> _T:
        """Return ``function(model, batch)``."""
        calls = self._calls
        whole, parts = calls.whole, calls.parts
        calls.modules = self._modules
        try:
            value = function(self.model, batch)
        finally:
            calls.modules = ()
        if calls.whole == whole and not self._watches_parts:
            self._watches_parts = True
            calls.parts += 1  # those of this call
            for part in self.model.modules():
                if part is not self.model:
                    part.register_forward_pre_hook(calls.run_part)
        if calls.whole == whole and calls.parts > parts:
            calls.count()
        return value


class _Calls:
    """Calls of the model and of its parts; without a reference to the model, which would outlive its last use."""

    def __init__(self, count: Callable[[], None]) -> None:
        self.count = count
        self.whole = self.parts = 0
        self.in_training = False
        self.modules: Sequence[nn.Module] = ()  # during a call

    def __deepcopy__(self, _: Any) -> "_Calls":
        return _Calls(lambda: None)  # a copy of the model is counted by itself

    def run_whole(self, *_: Any) -> None:
        self.whole += 1
        self.in_training = self.in_training or any(module.training for module in self.modules)
        self.count()

    def run_part(self, *_: Any) -> None:
        self.parts += 1
