"""A model whose forward passes are counted where they happen."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

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
        self._calls = _Calls(count)
        self._watches_parts = False
        model.register_forward_pre_hook(self._calls.run_whole)

    @property
    def in_training(self) -> bool:
        """Whether a function has run the model in training mode, into which it was not put here."""
        return self._calls.in_training

    def call(self, function: Callable[[nn.Module, Any], _T], batch: Any) -> _T:
        """Return ``function(model, batch)``."""
        calls = self._calls
        whole, parts = calls.whole, calls.parts
        value = function(self.model, batch)
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

    def run_whole(self, model: nn.Module, _: Any) -> None:
        self.whole += 1
        self.in_training |= model.training
        self.count()

    def run_part(self, *_: Any) -> None:
        self.parts += 1
