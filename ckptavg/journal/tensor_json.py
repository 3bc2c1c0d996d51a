"""Encode tensors and containers of tensors as JSON, bit for bit, and decode them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

_TENSOR: Final = "tensor"


def encode(value: Any) -> Any:
    """Encode ``value`` as JSON: tensors of any dtype, strings, numbers, None, and lists and dicts of these.

    Raises:
        TypeError: if it contains any other type.
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {_TENSOR: [dtype, list(value.shape), base64.b64encode(raw(value)).decode()]}
    if isinstance(value, Mapping):
        if _TENSOR in value or not all(isinstance(key, str) for key in value):
            raise TypeError("a dict with the key 'tensor' or with keys that are not strings cannot be written as JSON")
        return {key: encode(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [encode(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def raw(tensor: Tensor) -> bytearray:
    """Return the bytes of a tensor's elements in C order."""
    flat = tensor.detach().flatten()
    data = bytearray(flat.nbytes)
    if data:
        torch.frombuffer(data, dtype=flat.dtype).copy_(flat)
    return data


def decode(value: Any) -> Any:
    """Decode the result of `encode`; tensors are on the CPU, and sequences become lists."""
    if isinstance(value, Mapping):
        if _TENSOR not in value:
            return {key: decode(inner) for key, inner in value.items()}
        name, shape, text = value[_TENSOR]
        dtype, data = getattr(torch, name), bytearray(base64.b64decode(text))
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)
    return [decode(inner) for inner in value] if isinstance(value, list) else value
