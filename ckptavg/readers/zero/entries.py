"""Checked access to entries of DeepSpeed's model and optimizer states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptavg.errors import InputError
from ckptavg.readers import Node
from ckptavg.readers.pickle.object_tree import MAX_NAME
from ckptavg.readers.pickle.torch_objects import MAX_RANK


def checked_paddings(state: Mapping[str, Node], groups: Sequence[Mapping[str, object]], path: Path) -> list[list[int]]:
    """Return the number of elements to skip after each parameter of each group."""
    key = "param_alignment_paddings"
    paddings = state.get(key) or [[0] * len(group) for group in groups]
    checked = [naturals(group, key, path) for group in as_list(paddings, key, path)]
    if [len(group) for group in checked] != [len(group) for group in groups]:
        raise InputError(f"{key} has other lengths than the groups of param_shapes", path=path)
    return checked


def checked_shapes(node: Node, what: str, path: Path) -> dict[str, list[int]]:
    """Return name → shape, each checked to be valid."""
    shapes: dict[str, list[int]] = {}
    for name, sizes in as_mapping(node, what, path).items():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InputError(f"{what} has a name that no tensor may have", path=path, tensor=name[:100])
        shape = shapes[name] = naturals(sizes, f"{what} of {name}", path)
        if len(shape) > MAX_RANK or math.prod(shape) >= 2**63:
            raise InputError(f"{what} has more dimensions or elements than a tensor can have", path=path, tensor=name)
    return shapes


def naturals(node: Node, what: str, path: Path) -> list[int]:
    """Return ``node`` as a list of integers from 0 to 2^63 − 1."""
    items = as_list(node, what, path)
    integers = [item for item in items if type(item) is int and 0 <= item < 2**63]
    if len(integers) < len(items):
        raise InputError(f"{what} must be integers from 0 to 2^63 - 1", path=path)
    return integers


def as_list(node: Node, what: str, path: Path) -> Sequence[Node]:
    """Return ``node`` as a list, or raise InputError with ``what``."""
    if not isinstance(node, list):
        raise InputError(f"{what} is not a list", path=path)
    return node


def as_mapping(node: Node, what: str, path: Path) -> Mapping[str, Node]:
    """Return ``node`` as a mapping, or raise InputError with ``what``."""
    if not isinstance(node, Mapping):
        raise InputError(f"has no {what}", path=path)
    return node
