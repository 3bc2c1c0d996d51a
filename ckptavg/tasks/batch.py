"""Operations on the batches of a task: any nesting of tensors whose first dimension is the examples.

Shape suffixes: B = examples.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of ``batch``, and objects with a ``to`` method, to ``device``; other leaves are unchanged."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return _mapped(batch, move, whole=lambda part: hasattr(part, "to"))


def copied(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with every tensor copied to ``device``, even if it is already there."""

    def copy(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True, copy=True) if isinstance(leaf, Tensor) else leaf

    return _mapped(batch, copy, whole=_is_list)


def select(batch: Any, chosen_B: Tensor) -> Any:
    """Return the examples of ``batch`` where the boolean mask ``chosen_B`` is true.

    Tensors with B rows and lists of B non-tensor items are filtered; other tensors, lists, numbers and strings are
    shared by all examples and stay unchanged; a type that cannot be split into examples is a TypeError.
    """
    size = len(chosen_B)

    def filtered(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[chosen_B.to(leaf.device)] if leaf.ndim and leaf.shape[0] == size else leaf
        if isinstance(leaf, list | tuple) and len(leaf) == size:
            return type(leaf)(item for item, keep in zip(leaf, chosen_B.tolist(), strict=True) if keep)  # pyright: ignore
        if not isinstance(leaf, str | bytes | int | float | list | tuple | None):
            raise TypeError(f"a {type(leaf).__name__} cannot be cut into examples")
        return leaf

    return _mapped(batch, filtered, whole=_is_list)


def size(batch: Any) -> int:
    """Return the number of examples of a batch: the first dimension of its first tensor, or 1 without tensors."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    return next((size(part) for part in _parts(batch) if _has_tensor(part)), 1)


def sample(batch: Any) -> bytes:
    """Return a few values per example as bytes, from CPU tensors only; they identify the order of the examples."""
    count = size(batch)
    sampled = b""
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count and leaf.device.type == "cpu":
            first_two = leaf.reshape(count, leaf[:1].numel())[:, :2]
            sampled += repr(first_two.tolist()).encode()
    return sampled


def _has_tensor(part: Any) -> bool:
    return isinstance(part, Tensor) or any(_has_tensor(inner) for inner in _parts(part))


def leaves(batch: Any, *, movable: bool = False) -> list[Any]:
    """List the leaves of a batch in order; with ``movable``, an object with a ``to`` method is a single leaf."""
    collected: list[Any] = []
    _mapped(batch, collected.append, whole=lambda part: _is_list(part) or (movable and hasattr(part, "to")))
    return collected


def _is_list(part: Any) -> bool:
    """Return whether ``part`` is a list or tuple without tensors, such as a list of strings."""
    return isinstance(part, list | tuple) and not _has_tensor(part)


def _parts(batch: Any) -> Any:
    return batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()


def _mapped(batch: Any, change: Callable[[Any], Any], whole: Callable[[Any], bool]) -> Any:
    """Apply ``change`` to every leaf and keep the nesting; a container for which ``whole`` is true is a leaf."""
    if not whole(batch):
        if isinstance(batch, Mapping):
            mapped = {key: _mapped(value, change, whole) for key, value in batch.items()}
            try:
                return type(batch)(mapped)  # pyright: ignore
            except TypeError:  # a defaultdict, or another mapping with a different constructor
                return mapped
        if isinstance(batch, list | tuple):
            items = [_mapped(value, change, whole) for value in batch]
            return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)  # pyright: ignore
    return change(batch)
