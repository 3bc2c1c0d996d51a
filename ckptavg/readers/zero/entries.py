"""Entries of DeepSpeed's model and optimizer states, checked for what they should be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptavg.errors import InputError
from ckptavg.readers import Node
from ckptavg.readers.pickle.object_tree import MAX_NAME
from ckptavg.readers.pickle.torch_objects import MAX_RANK


def told_paddings(state: Mapping[str, Node], groups: Sequence[Mapping[str, object]], path: Path) -> list[list[int]]:
    """How many elements are skipped behind each parameter of each group."""
    key = "param_alignment_paddings"
    told = state.get(key) or [[0] * len(group) for group in groups]
    found = [naturals(one, key, path) for one in as_list(told, key, path)]
    if [len(one) for one in found] != [len(group) for group in groups]:
        raise InputError(f"{key} has other lengths than the groups of param_shapes", path=path)
    return found


def told_shapes(node: Node, what: str, path: Path) -> dict[str, list[int]]:
    """Name → shape, every one of them possible."""
    found: dict[str, list[int]] = {}
    for name, sizes in as_mapping(node, what, path).items():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InputError(f"no tensor should have this name in {what}", path=path, tensor=name[:100])
        shape = found[name] = naturals(sizes, f"{what} of {name}", path)
        if len(shape) > MAX_RANK or math.prod(shape) >= 2**63:
            raise InputError(f"{what} tells more dimensions or elements than a tensor has", path=path, tensor=name)
    return found


def naturals(node: Node, what: str, path: Path) -> list[int]:
    """A list of integers from 0 to 2^63 − 1."""
    items = as_list(node, what, path)
    found = [one for one in items if type(one) is int and 0 <= one < 2**63]
    if len(found) < len(items):
        raise InputError(f"{what} must be integers from 0 to 2^63 - 1", path=path)
    return found


def as_list(node: Node, what: str, path: Path) -> Sequence[Node]:
    """``node`` as a list, or an InputError that names ``what``."""
    if not isinstance(node, list):
        raise InputError(f"{what} is not a list", path=path)
    return node


def as_mapping(node: Node, what: str, path: Path) -> Mapping[str, Node]:
    """``node`` as a mapping, or an InputError that names ``what``."""
    if not isinstance(node, Mapping):
        raise InputError(f"has no {what}", path=path)
    return node
