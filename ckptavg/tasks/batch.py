"""Operations on the batches of a task: any nesting of tensors whose first dimension is the examples.

Shape suffixes: B = examples.
"""

import copy
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ckptavg.errors import TaskError

_PLAIN: Final = (str, bytes, int, float, type(None))
_SAMPLES: Final = 16  # numbers of each example and tensor that are compared between passes
_PRIME: Final = (1 << 61) - 1
_BASE: Final = 1_000_003


class Batch(NamedTuple):
    """A batch as the task's loader gave it, and its number of examples."""

    data: Any
    size: int


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of ``batch``, and objects with a ``to`` method, to ``device``; other leaves are unchanged."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf.to(device) if _moves(leaf) else leaf

    return _mapped(batch, move, whole=_moves)


def copied(batch: Any, device: torch.device | None = None) -> Any:
    """Return ``batch`` with every tensor copied to ``device``, by default its own, even if it is already there."""

    def duplicate(leaf: Any) -> Any:
        return leaf.to(device or leaf.device, non_blocking=True, copy=True) if isinstance(leaf, Tensor) else leaf

    return _mapped(batch, duplicate, whole=_is_list)


def select(batch: Any, chosen_B: Tensor) -> Any:
    """Return the examples of ``batch`` where the boolean mask ``chosen_B`` is true.

    Tensors with B rows and lists of B items are filtered; other tensors, lists, numbers and strings are shared by all
    examples and stay unchanged; a type that cannot be split into examples is a TypeError.
    """
    size = len(chosen_B)

    def filtered(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if size in leaf.shape[1:] and leaf.shape[0] != size:
                raise TypeError(f"a tensor of shape {list(leaf.shape)} has its examples in another dimension")
            return leaf[chosen_B.to(leaf.device)] if leaf.ndim and leaf.shape[0] == size else leaf
        if isinstance(leaf, PackedSequence):
            raise TypeError("a PackedSequence cannot be cut into examples")
        if isinstance(leaf, list | tuple) and len(leaf) == size:
            return type(leaf)(item for item, keep in zip(leaf, chosen_B.tolist(), strict=True) if keep)  # pyright: ignore
        if not isinstance(leaf, str | bytes | int | float | list | tuple | None):
            raise TypeError(f"a {type(leaf).__name__} cannot be cut into examples")
        return leaf

    return _mapped(batch, filtered, whole=lambda part: _is_list(part) or _lists_examples(part, size))


def size(batch: Any, expected: int | None = None, *, exactly: bool = False) -> int:
    """Return the number of examples of a batch: what it states, else the only one that its parts allow.

    A batch states it by ``num_graphs`` or ``batch_size``, as in PyTorch Geometric, DGL and tensordict. Parts allow the
    first dimension of a tensor, and the length of a list without tensors or of one whose items are alike.

    Args:
        batch: tensors in any nesting of mappings, dataclasses, named tuples, tuples, lists and objects.
        expected: the size that its loader is set to at this place; it is taken if the parts allow it.
        exactly: whether a single larger number is doubtful as well; a smaller one may be what is left of the batch.
    Raises:
        TaskError: if the parts allow several numbers, or none.
    """
    allowed = _sizes(batch)
    if expected in allowed:
        return expected
    if isinstance(batch, list) and len(batch) == 1 and len(allowed) > 1:
        allowed -= {1}  # a list of one field, as of a TensorDataset
    if len(allowed) == 1 and not (exactly and expected is not None and max(allowed) > expected):
        return allowed.pop()
    found = f"they allow {' or '.join(map(str, sorted(allowed)))}" if allowed else "none has examples"
    set_to = f", and its loader is set to {expected}" if expected is not None and allowed else ""
    message = f"the number of examples of a batch (a {type(batch).__name__}) is unclear from its parts: {found}{set_to}"
    raise TaskError(message, hint="add to the task file: def batch_size(batch): return ...")


def _sizes(part: Any) -> set[int]:
    """Return the numbers of examples that a part of a batch allows."""
    if isinstance(part, Tensor):
        return {part.size(0)} if part.ndim else set()
    if isinstance(part, PackedSequence):
        return {int(part.batch_sizes[0])}
    if isinstance(part, _PLAIN):
        return set()
    for name in ("num_graphs", "batch_size"):
        stated = _attribute(part, name)
        if isinstance(stated, torch.Size) and stated:
            return {stated[0]}
        if type(stated) is int:
            return {stated}
    inner = list(_parts(part) or _attributes(part))
    if isinstance(part, list | tuple) and all(isinstance(item, _PLAIN) for item in part):
        return {len(part)} if part else set()
    sizes = set[int]().union(*map(_sizes, [item for item in inner if not _attributes(item)]))
    if isinstance(part, list | tuple) and not hasattr(part, "_fields"):
        fields = isinstance(part, tuple) and len(sizes) == 1 and all(isinstance(item, Tensor) for item in part)
        return sizes | ({len(part)} if part and _are_alike(part) and not fields else set())
    return sizes or ({len(part)} if not inner and hasattr(part, "__len__") and not isinstance(part, Mapping) else set())


def _attribute(part: Any, name: str) -> Any:
    """Return an attribute, or None: of a mapping whose keys are attributes, one that is missing may be any error."""
    with suppress(Exception):
        return getattr(part, name, None)
    return None


def _attributes(part: Any) -> list[Any]:
    """Return the attributes of an object that is no container and holds tensors."""
    if isinstance(part, (Tensor, Mapping, list, tuple, *_PLAIN)) or _is_record(part):
        return []
    attributes = list(getattr(part, "__dict__", {}).values())
    return attributes if any(map(_has_tensor, attributes)) else []


def _are_alike(items: Sequence[Any]) -> bool:
    """Return whether items of a list may be examples: no tensors, or tensors or containers of one kind."""
    if not any(map(_has_tensor, items)):
        return True
    if len({type(item) for item in items}) > 1:
        return False
    tensors = [item for item in items if isinstance(item, Tensor)]
    return len({(tensor.dtype, tensor.shape[1:]) for tensor in tensors}) < 2


def _lists_examples(part: Any, size: int) -> bool:
    """Return whether ``part`` is a list with one item per example, rather than of fields with a row per example."""
    listed = isinstance(part, list | tuple) and not isinstance(part, PackedSequence) and len(part) == size
    return listed and size not in set[int]().union(*map(_sizes, part))


def checksum(batch: Any, size: int) -> int:
    """Return a number that identifies the examples of a batch in order, from a few values of each on the CPU.

    Of consecutive batches, `joined` makes that of all their examples, however they are divided into batches.
    """
    columns: list[list[Any]] = []
    for leaf in leaves(batch, examples=size):
        if isinstance(leaf, Tensor):
            if leaf.ndim and leaf.shape[0] == size and leaf.device.type == "cpu" and leaf.layout == torch.strided:
                columns.append(_sampled(leaf.reshape(size, leaf[:1].numel())).tolist())
        elif isinstance(leaf, list | tuple) and len(leaf) == size:
            columns.append([[_first(inner) for inner in leaves(item)] for item in leaf])
    total = 0
    for row in zip(*columns, strict=True):
        total = (total * _BASE + zlib.crc32(repr(row).encode())) % _PRIME
    return total


def joined(first: int, second: int, size: int) -> int:
    """Return the checksum of the examples of ``first`` followed by the ``size`` examples of ``second``."""
    return (first * pow(_BASE, size, _PRIME) + second) % _PRIME


def _first(leaf: Any) -> Any:
    on_cpu = isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided
    return _sampled(leaf.reshape(1, -1)).tolist() if on_cpu else "" if isinstance(leaf, Tensor) else leaf


def _sampled(rows: Tensor) -> Tensor:
    """Return a few columns, evenly spaced."""
    count = rows.shape[1]
    return rows if count <= _SAMPLES else rows[:, torch.linspace(0, count - 1, _SAMPLES).long()]


def _has_tensor(part: Any) -> bool:
    return not isinstance(part, _PLAIN) and (isinstance(part, Tensor) or any(map(_has_tensor, _parts(part))))


def leaves(batch: Any, *, movable: bool = False, examples: int | None = None) -> list[Any]:
    """List the leaves of a batch in order.

    With ``movable``, an object with a ``to`` method is one leaf; with the number of ``examples``, a list of them is.
    """

    def whole(part: Any) -> bool:
        listed = examples is not None and _lists_examples(part, examples)
        return listed or _is_list(part) or (movable and _moves(part))

    def below(part: Any) -> Iterator[Any]:
        nested = isinstance(part, Mapping | list | tuple) or _is_record(part)
        if not nested or isinstance(part, PackedSequence) or whole(part):
            yield part
            return
        for inner in _parts(part):
            yield from below(inner)

    return list(below(batch))


def _is_list(part: Any) -> bool:
    """Return whether ``part`` is a list or tuple without tensors, such as a list of strings."""
    return isinstance(part, list | tuple) and not _has_tensor(part)


def _parts(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, list | tuple):
        return batch
    return [getattr(batch, field.name) for field in dataclasses.fields(batch)] if _is_record(batch) else ()


def _moves(part: Any) -> bool:
    """Return whether a part of a batch has a method ``to``, as tensors have."""
    return not isinstance(part, _PLAIN) and callable(_attribute(part, "to"))


def _is_record(part: Any) -> bool:
    return dataclasses.is_dataclass(part) and not isinstance(part, type)


def _mapped(batch: Any, change: Callable[[Any], Any], whole: Callable[[Any], bool]) -> Any:
    """Apply ``change`` to every leaf and keep the nesting; a container for which ``whole`` is true is a leaf."""
    if not whole(batch) and not isinstance(batch, PackedSequence):
        if isinstance(batch, Mapping):
            mapped = {key: _mapped(value, change, whole) for key, value in batch.items()}
            try:
                return type(batch)(mapped)  # pyright: ignore
            except TypeError:  # a defaultdict, or another mapping with a different constructor
                return mapped
        if isinstance(batch, list | tuple):
            items = [_mapped(value, change, whole) for value in batch]
            return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)  # pyright: ignore
        if _is_record(batch):
            record = copy.copy(batch)  # without its constructor, which may convert or check its fields
            for field in dataclasses.fields(batch):
                object.__setattr__(record, field.name, _mapped(getattr(batch, field.name), change, whole))
            return record
    return change(batch)
