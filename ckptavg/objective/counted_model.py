"""A model whose forward passes are counted where they happen."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_T = TypeVar("_T")


class CountedModel:
    """A model in eval mode, on which functions of a task are called.

    A function may run parts of the model instead of the model itself (``model.encoder(inputs)``): a call that does
    counts as one forward pass. Hooks on the parts are added when that happens for the first time.

    Attributes:
        in_training: whether a function has run the model in training mode, into which it was not put here.

    Args:
        model: the model.
        count: called before each forward pass.
    """

    def __init__(self, model: nn.Module, count: Callable[[], None]) -> None:
        self.model = model
        self._count = count
        self._whole = self._parts = 0  # forward calls so far
        self._watches_parts = self.in_training = False
        model.register_forward_pre_hook(self._run_whole)

    def call(self, function: Callable[[nn.Module, Any], _T], batch: Any) -> _T:
        """Return ``function(model, batch)``."""
        before = self._whole, self._parts
        value = function(self.model, batch)
        if self._whole == before[0]:
            if not self._watches_parts:
                self._watch_parts()
            if self._parts > before[1]:
                self._count()
        return value

    def _watch_parts(self) -> None:
        self._watches_parts = True
        self._parts += 1  # those of the call that led here
        for part in self.model.modules():
            if part is not self.model:
                part.register_forward_pre_hook(self._run_part)

    def _run_whole(self, *_: Any) -> None:
        self._whole += 1
        self.in_training |= self.model.training
        self._count()

    def _run_part(self, *_: Any) -> None:
        self._parts += 1
