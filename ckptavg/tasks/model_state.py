"""Undo what a task's function does to the model besides running it."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

_HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Copy(NamedTuple):
    """A copy of a buffer, and the versions of both at that time."""

    values: Tensor
    version: int
    source_version: int


class ModelState:
    """The state of one model that belongs to its caller; the tree of its modules must not change afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = list(model.modules())
        self._parameters = list(model.parameters())
        self._hooks: list[dict[int, Any]] = [vars(module)[name] for module in self._modules for name in _HOOKS]
        self._copies: dict[int, _Copy] = {}  # by the id of the buffer

    @contextmanager
    def restored(self, undone: set[str]) -> Generator[None]:
        """Restore training modes and hooks of modules, buffers, and requires_grad and grad of parameters afterwards.

        In the context modules have copies of their buffers, so that a graph that is built there stays valid. Those that
        are in training mode at the start keep their own: the caller wants them updated (BatchNorm statistics).

        Args:
            undone: gets the kinds of what was changed.
        """
        modes = [module.training for module in self._modules]
        hooks = [dict(owner) if owner else {} for owner in self._hooks]
        flags = [(parameter.requires_grad, parameter.grad) for parameter in self._parameters]
        lenders = [module for module in self._modules if not module.training and vars(module)["_buffers"]]
        owners: list[dict[str, Tensor | None]] = [vars(module)["_buffers"] for module in lenders]
        buffers = [dict(owner) for owner in owners]
        lent = [
            {name: buffer if buffer is None else self._copied(buffer, lender) for name, buffer in owner.items()}
            for owner, lender in zip(buffers, lenders, strict=True)
        ]
        for owner, copies in zip(owners, lent, strict=True):
            owner.update({name: copy and copy.values for name, copy in copies.items()})
        try:
            yield
        finally:
            for module, mode in zip(self._modules, modes, strict=True):
                if module.training is not mode:
                    module.training = mode
                    undone.add("training mode")
            for owner, before in zip(self._hooks, hooks, strict=True):
                if owner != before:
                    _replace(owner, before)
                    undone.add("hooks")
            for owner, before, copies in zip(owners, buffers, lent, strict=True):
                if len(owner) != len(before) or any(map(_is_changed, map(owner.get, copies), copies.values())):
                    undone.add("buffers")
                _replace(owner, before)
            for parameter, (flag, grad) in zip(self._parameters, flags, strict=True):
                if parameter.requires_grad is not flag:
                    parameter.requires_grad_(flag)
                    undone.add("requires_grad")
                if parameter.grad is not grad:
                    parameter.grad = grad

    def _copied(self, buffer: Tensor, owner: nn.Module) -> _Copy:
        """Return a copy of a buffer: the last one, unless either may have changed.

        The values of a buffer that shares its storage may change without its version; so may those of normalisations.
        """
        copy = self._copies.get(id(buffer))
        is_sparse = buffer.layout != torch.strided
        versioned = is_sparse or (
            buffer.untyped_storage().nbytes() == buffer.nbytes and not isinstance(owner, _NormBase)
        )
        if copy is None or not versioned or (copy.values._version, buffer._version) != copy[1:]:
            values = buffer.detach().clone()
            copy = self._copies[id(buffer)] = _Copy(values, values._version, buffer._version)
        return copy


def _is_changed(buffer: Tensor | None, copy: _Copy | None) -> bool:
    return buffer is not (copy and copy.values) or (copy is not None and copy.values._version != copy.version)


def _replace(owner: dict[Any, Any], content: dict[Any, Any]) -> None:
    owner.clear()
    owner.update(content)
