"""Encode tensors and containers of tensors as JSON, bit for bit, and decode them.

A tensor is ``[dtypes, shape, text]``: its elements in the last dtype, and in the text for each k the k-th bytes of all
elements, compressed by zlib, in base 85.
"""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

_TENSOR: Final = "tensor"
_NARROW: Final = {torch.float64: torch.float32}


def encode(value: Any) -> Any:
    """Encode ``value`` as JSON: tensors of any dtype, strings, numbers, None, and lists and dicts of these.

    Raises:
        TypeError: if it contains any other type.
    """
    if isinstance(value, Tensor):
        data, kinds = raw(value), [value.dtype]
        narrow = value.detach().to(_NARROW.get(value.dtype, value.dtype))
        if narrow.dtype != value.dtype and raw(narrow.to(value.dtype)) == data:  # it came from a float32 model
            data, kinds = raw(narrow), [value.dtype, narrow.dtype]
        size = kinds[-1].itemsize
        # exponents, which are much alike, lie together and apart from the mantissas, which are not
        text = " ".join(base64.b85encode(zlib.compress(data[k::size], 9)).decode() for k in range(size))
        return {_TENSOR: [[str(kind).removeprefix("torch.") for kind in kinds], list(value.shape), text]}
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
        names, shape, text = value[_TENSOR]
        kinds = [getattr(torch, name) for name in names]
        planes = [zlib.decompress(base64.b85decode(part)) for part in text.split(" ")]
        data = bytearray(len(planes) * len(planes[0]))
        for k, plane in enumerate(planes):
            data[k :: len(planes)] = plane
        flat = torch.frombuffer(data, dtype=kinds[-1]) if data else torch.empty(0, dtype=kinds[-1])
        return flat.to(kinds[0]).view(shape)
    return [decode(inner) for inner in value] if isinstance(value, list) else value
