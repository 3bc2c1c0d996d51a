"""Batches of a task: any nesting of tensors, of which the first dimension is the examples.

Shape suffixes: B = examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with every tensor on ``device``; anything else is passed on as it is."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        moved = getattr(leaf, "to", None)
        return leaf if moved is None else moved(device)

    return _mapped(batch, move, whole=lambda part: hasattr(part, "to"))


def copied(batch: Any, device: torch.device) -> Any:
    """``batch`` with a copy of every tensor on ``device``, also of those that are there already."""
    return _mapped(
        batch,
        lambda leaf: leaf.to(device, non_blocking=True, copy=True) if isinstance(leaf, Tensor) else leaf,
        whole=_is_list,
    )


def select(batch: Any, chosen_B: Tensor) -> Any:
    """The examples of ``batch`` at which the boolean mask ``chosen_B`` is true.

    Tensors with B rows and lists of B other things are cut; other tensors, lists, numbers and text belong to all
    examples and stay.

    Raises:
        TypeError: if the batch is of a kind that cannot be cut.
    """
    size = len(chosen_B)

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[chosen_B.to(leaf.device)] if leaf.ndim and leaf.shape[0] == size else leaf
        if isinstance(leaf, list | tuple) and len(leaf) == size:
            return type(leaf)(item for item, keep in zip(leaf, chosen_B.tolist(), strict=True) if keep)  # pyright: ignore
        if not isinstance(leaf, str | bytes | int | float | list | tuple | None):
            raise TypeError(f"a {type(leaf).__name__} cannot be cut into examples")
        return leaf

    return _mapped(batch, cut, whole=_is_list)


def size(batch: Any) -> int:
    """The number of examples of a batch: the first dimension of the first tensor in it, 1 if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    return next((size(part) for part in _parts(batch) if has_tensor(part)), 1)


def sample(batch: Any) -> bytes:
    """A few bytes of each example, by which one order of the same examples is told from another; of CPU tensors."""
    count = size(batch)
    found = b""
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count and leaf.device.type == "cpu":
            few = leaf.reshape(count, leaf[:1].numel())[:, :2]
            found += repr(few.tolist()).encode()
    return found


def has_tensor(part: Any) -> bool:
    """Whether there is a tensor anywhere in it."""
    return isinstance(part, Tensor) or any(has_tensor(inner) for inner in _parts(part))


def leaves(batch: Any, *, movable: bool = False) -> list[Any]:
    """Everything in a batch that is no container of tensors, in order; with ``movable``, what has a ``to`` is whole."""
    found: list[Any] = []
    _mapped(batch, found.append, whole=lambda part: _is_list(part) or (movable and hasattr(part, "to")))
    return found


def _is_list(part: Any) -> bool:
    """Whether it is a list of no tensors, such as texts."""
    return isinstance(part, list | tuple) and not has_tensor(part)


def _parts(batch: Any) -> Any:
    return batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()


def _mapped(batch: Any, change: Callable[[Any], Any], whole: Callable[[Any], bool]) -> Any:
    """The same nesting with ``change`` of every leaf; a container that is ``whole`` is a leaf."""
    if not whole(batch):
        if isinstance(batch, Mapping):
            mapped = {key: _mapped(value, change, whole) for key, value in batch.items()}
            try:
                return type(batch)(mapped)  # pyright: ignore
            except TypeError:  # a defaultdict, and others that are made differently
                return mapped
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*(_mapped(value, change, whole) for value in batch))  # pyright: ignore
        if isinstance(batch, list | tuple):
            return type(batch)(_mapped(value, change, whole) for value in batch)  # pyright: ignore
    return change(batch)
