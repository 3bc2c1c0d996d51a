"""Undo what a task's function does to the model besides running it."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

_HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class ModelState:
    """The state of one model that belongs to its caller; the tree of its modules must not change afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = list(model.modules())
        self._parameters = list(model.parameters())
        self._hooks: list[dict[int, Any]] = [vars(module)[name] for module in self._modules for name in _HOOKS]
        self._saved: dict[int, Tensor] = {}  # id of a buffer → the copy of its values

    @contextmanager
    def restored(self, undone: set[str]) -> Generator[None]:
        """Restore training modes and hooks of modules, buffers, and requires_grad and grad of parameters afterwards.

        Buffers of modules that are in training mode at the start keep their new values: the caller wants them updated
        (BatchNorm statistics). Others are restored through ``.data``, so that a graph built in the context stays valid.

        Args:
            undone: gets the kinds of what was changed.
        """
        modes = [module.training for module in self._modules]
        hooks = [dict(owner) if owner else {} for owner in self._hooks]
        flags = [(parameter.requires_grad, parameter.grad) for parameter in self._parameters]
        owners = [owner for module in self._modules if not module.training and (owner := vars(module)["_buffers"])]
        buffers = [dict(owner) for owner in owners]
        present = [buffer for owner in buffers for buffer in owner.values() if buffer is not None]
        versions, values = [buffer._version for buffer in present], self._copied(present)
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
            for owner, before in zip(owners, buffers, strict=True):
                if len(owner) != len(before) or any(owner.get(name) is not entry for name, entry in before.items()):
                    _replace(owner, before)
                    undone.add("buffers")
            if versions != [buffer._version for buffer in present]:
                undone.add("buffers")
            for parameter, (flag, grad) in zip(self._parameters, flags, strict=True):
                if parameter.requires_grad is not flag:
                    parameter.requires_grad_(flag)
                    undone.add("requires_grad")
                if parameter.grad is not grad:
                    parameter.grad = grad
            for targets, copies in values:
                torch._foreach_copy_(targets, copies)  # pyright: ignore

    def _copied(self, buffers: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return, for each dtype, views of the buffers and copies of their values, whose memory is reused."""
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for buffer in buffers:
            data, copy = buffer.data, self._saved.get(id(buffer))
            if copy is None or copy.shape != data.shape or copy.dtype != data.dtype or copy.device != data.device:
                copy = self._saved[id(buffer)] = torch.empty_like(data)
            targets, copies = by_dtype.setdefault(data.dtype, ([], []))
            targets.append(data)
            copies.append(copy)
        for targets, copies in by_dtype.values():
            torch._foreach_copy_(copies, targets)  # pyright: ignore
        return list(by_dtype.values())


def _replace(owner: dict[Any, Any], content: dict[Any, Any]) -> None:
    owner.clear()
    owner.update(content)
