"""Checked access to entries of DeepSpeed's model and optimizer states."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptavg.errors import InputError
from ckptavg.readers import MAX_RANK, Node, naturals
from ckptavg.readers.pickle.object_tree import MAX_NAME


def checked_paddings(
    state: Mapping[str, Node], groups: Sequence[Mapping[str, object]], path: Path
) -> list[tuple[int, ...]]:
    """Return the number of elements to skip after each parameter of each group."""
    key = "param_alignment_paddings"
    paddings = state.get(key) or [[0] * len(group) for group in groups]
    checked = [as_naturals(group, key, path) for group in as_list(paddings, key, path)]
    if [len(group) for group in checked] != [len(group) for group in groups]:
        raise InputError(f"{key} has other lengths than the groups of param_shapes", path=path)
    return checked


def checked_shapes(node: Node, what: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Return name → shape, each checked to be valid."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, sizes in as_mapping(node, what, path).items():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InputError(f"{what} has a name that no tensor may have", path=path, tensor=name[:100])
        shape = shapes[name] = as_naturals(sizes, f"{what} of {name}", path)
        if len(shape) > MAX_RANK or math.prod(shape) >= 2**63:
            raise InputError(f"{what} has more dimensions or elements than a tensor can have", path=path, tensor=name)
    return shapes


def as_naturals(node: Node, what: str, path: Path) -> tuple[int, ...]:
    """Return ``node`` as a tuple of integers from 0 to 2^63 − 1."""
    integers = naturals(as_list(node, what, path), list, sys.maxsize)
    if integers is None:
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
