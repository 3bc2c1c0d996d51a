"""Tensors, and what holds them, as JSON and back, with all their bits."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

_TENSOR: Final = "tensor"


def encode(value: Any) -> Any:
    """``value`` as JSON: tensors of any dtype, and text, numbers, lists and dicts with such in them.

    Raises:
        TypeError: if there is anything else in it.
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {_TENSOR: [dtype, list(value.shape), base64.b64encode(raw(value)).decode()]}
    if isinstance(value, Mapping):
        if _TENSOR in value or not all(isinstance(key, str) for key in value):
            raise TypeError("such a dict cannot be told from a tensor, or from JSON's own")
        return {key: encode(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [encode(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def raw(tensor: Tensor) -> bytearray:
    """The bytes of its elements, in C order."""
    flat = tensor.detach().flatten()
    data = bytearray(flat.nbytes)
    if data:
        torch.frombuffer(data, dtype=flat.dtype).copy_(flat)
    return data


def decode(value: Any) -> Any:
    """What was encoded, its tensors on the CPU; sequences come back as lists."""
    if isinstance(value, Mapping):
        if _TENSOR not in value:
            return {key: decode(inner) for key, inner in value.items()}
        name, shape, text = value[_TENSOR]
        dtype, data = getattr(torch, name), bytearray(base64.b64decode(text))
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)
    return [decode(inner) for inner in value] if isinstance(value, list) else value
